"""From values to a table: means and 95 % intervals of an evaluation, and the names of its policies.

In: for every policy, kind of prefix and suite one value between 0 and 1 a prefix, None where there
is no verdict. Out: the summary that summary.json and result.json hold, and its table as text.
"""

import numpy as np

NAMES = {"base": "base", "baseline": "next-token baseline", "method": "self-improving"}
HEADS = {"quality": "quality win rate", "nll": "held-out NLL"}
HEADS |= {"nll_sound": "of sound sentences", "nll_faulty": "of faulty ones", "kl": "KL(base, it)"}
# Nats a token: the NLL of the documents' own suffixes, of some of their sentences (of the pocket
# world, where each is known to be true, safe and new, or not), the KL from the first policy.
LIKELIHOODS = ("nll", "nll_sound", "nll_faulty", "kl")


def bootstrap(groups: list[list[float]], seed: int = 0, times: int = 1000) -> list[float]:
    """95 % interval of the mean over all values, resampled within each group."""
    rng, arrays = np.random.default_rng(seed), [np.array(group) for group in groups if group]
    means = [
        sum(group[rng.integers(len(group), size=len(group))].sum() for group in arrays)
        for _ in range(times)
    ]
    return (np.quantile(means, [0.025, 0.975]) / sum(map(len, arrays))).tolist()


def overall(row: dict, column: str) -> float | None:
    """A policy's mean over all judged prefixes of all kinds (the kinds themselves for nats), of
    the summary's {kind: cell}; None where nothing was judged."""
    cells = [cell for cell in row.values() if cell.get(column) is not None]
    counts = [cell.get("n", {}).get(column, 1) for cell in cells]
    total = sum(n * cell[column] for n, cell in zip(counts, cells, strict=True))
    return total / sum(counts) if cells else None


def summarise(values: dict, written: dict, suites) -> dict:
    """values: policy -> kind of prefix -> suite -> one a prefix; written: policy -> kind ->
    {"texts", LIKELIHOODS} -> {"baseline", "suites", "policies": {name: {kind: {suite: mean,
    LIKELIHOODS, "n", "interval"}}}, "overall": {name: {suite: {"mean", "interval", "n"}}},
    "values", "continuations"}"""
    policies, overalls = {}, {}
    for name, kinds in values.items():
        made = written[name]
        policies[name] = {kind: cell_of(kinds[kind], made.get(kind, {}), suites) for kind in kinds}
        overalls[name] = {}
        for suite in suites:
            groups = [judgments(found, suite) for found in kinds.values()]
            mean, count = overall(policies[name], suite), sum(map(len, groups))
            interval = bootstrap(groups) if count else None
            overalls[name][suite] = {"mean": mean, "interval": interval, "n": count}
    texts = {
        name: {k: made["texts"] for k, made in kinds.items()} for name, kinds in written.items()
    }
    about = {"baseline": next(iter(values)), "suites": list(suites), "policies": policies}
    return about | {"overall": overalls, "values": values, "continuations": texts}


def judgments(found: dict, suite: str) -> list[float]:
    return [value for value in found.get(suite, ()) if value is not None]


def cell_of(found: dict, made: dict, suites) -> dict:
    """Of one policy and kind of prefix: means, how many values they are of, and intervals."""
    cell: dict = {name: made.get(name) for name in LIKELIHOODS}
    cell |= {"n": {"nll": 1}, "interval": {}}
    for suite in suites:
        values = judgments(found, suite)
        cell[suite] = sum(values) / len(values) if values else None
        cell["n"][suite] = len(values)
        cell["interval"][suite] = bootstrap([values]) if values else None
    return cell


# ------------------------------------------------------------------------------------------------
# As text


def show(value: float | None, interval=None, nats: bool = False) -> str:
    """0.901 -> 90.1, or 90.1±1.2 with half the width of its 95 % interval."""
    if value is None:
        return "-"
    width = interval[1] - interval[0] if interval else 0.0
    spread = f"±{50 * width:.1f}" if width else ""
    return f"{value:.2f}" if nats else f"{100 * value:.1f}{spread}"


def aligned(rows: list[list[str]]) -> str:
    """Columns for a terminal; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(summary: dict) -> str:
    """A row a policy: the mean over all prefixes, with the 95 % interval; of two kinds of prefix
    each follows in parentheses, more have a table of their own."""
    cells = [cell for row in summary["policies"].values() for cell in row.values()]
    known = [name for name in LIKELIHOODS if any(cell.get(name) is not None for cell in cells)]
    parts = [by_policy(summary, [*summary["suites"], *known[:1]])]
    if known[1:]:
        parts.append(by_policy(summary, known))
    if len(next(iter(summary["policies"].values()))) > 2:
        parts.append(by_set(summary))
    return "\n\n".join(parts)


def by_policy(summary: dict, columns: list[str]) -> str:
    kinds = list(next(iter(summary["policies"].values())))
    several = len(kinds) == 2
    head = [f"mean ({' / '.join(kinds)})" if several else "mean" if kinds[2:] else ""]
    rows = [head + [HEADS.get(c, c) for c in columns]]
    for name, row in summary["policies"].items():
        cells = [NAMES.get(name, name)]
        for column in columns:
            nats = column in LIKELIHOODS
            interval = None if nats else summary["overall"][name][column]["interval"]
            each = " / ".join(show(row[kind].get(column), nats=nats) for kind in kinds)
            mean = show(overall(row, column), interval, nats)
            cells.append(f"{mean} ({each})" if several else mean)
        rows.append(cells)
    return aligned(rows)


def by_set(summary: dict) -> str:
    """A row a suite and set, a column a policy."""
    policies = summary["policies"]
    rows = [["suite", "set", "n", *(NAMES.get(name, name) for name in policies)]]
    for suite in summary["suites"]:
        for kind, cell in next(iter(policies.values())).items():
            if cell[suite] is not None:
                cells = [row[kind] for row in policies.values()]
                each = [show(c[suite], c["interval"][suite]) for c in cells]
                rows.append([suite, kind, str(cell["n"][suite]), *each])
    return aligned(rows)
