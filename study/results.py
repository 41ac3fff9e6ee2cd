"""One page of results with pictures, from the run folders of reproduce.py: RESULTS.md.

    python results.py [--demo RUN]     the page, and docs/results_*.png

In: OUT's finished runs (what is missing is said to be missing), docs/results_notes.md (comments by
hand), and a run of the demo for the gallery. Out: verdicts on the paper's findings, pictures,
tables 1, 2 and 6 beside the paper's figures, and the same prefixes continued by three policies.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from evaluation.results import NAMES
from evaluation.sets import held_out_sets
from study.findings import BEYOND, FINDINGS, Study, verdict
from study.reproduce import markdown, records, seed_list, table
from study.tables import COLUMNS, TABLES, Row
from support.tokenizer import load_tokenizer
from tools.plot import smooth

HERE = Path(__file__).parents[1]
INTRO = """\
# Results

The paper's findings, tested in miniature: a 0.4M-parameter policy on the pocket world, {seeds}
seeds, 40 steps of 16 prefixes (from scratch: 200 of 32). A row is the paper's configuration of that
row with only the scale changed, and the scale is the same for all rows; the rule for each verdict
([findings.py](findings.py)) was fixed early, when one quality run with 4 rollouts and the
next-token rows had been seen; the test with a weak rewriter came after table 6. The judge is exact
unless a row says otherwise, and the judge of the evaluation always is. So this tests the method's
mechanics, not how
much a real model gains. Quality and coherence are win rates in % against the seed's base; the
spread is the standard deviation of the difference over seeds. "As good as" and "no harm" mean that
no loss beyond the spread was seen, not that there is none.

    python reproduce.py all      # what is missing in out/study; interrupted, it goes on
    python results.py            # this page
"""


def study_of(out: Path, seeds: list[int]) -> Study:
    """Records of all rows by "config --key=value"."""
    study = Study()
    study.seeds = seeds
    for rows in TABLES.values():
        for row in rows:
            if row.config:
                study[row_name(row)] = records(out, row, seeds)
    circle = out.parent / "circle" / "circle.json"
    study["circle"] = json.loads(circle.read_text()) if circle.exists() else {}
    return study


def row_name(row: Row) -> str:
    return " ".join([row.config, *(f"--{key}={value}" for key, value in row.changes.items())])


# ------------------------------------------------------------------------------------------------
# Pictures


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else float("nan")


def points(ax, x, values: list[float], color: str = "C0", label: str | None = None):
    """The mean, large, and each seed, small."""
    ax.plot([x] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
    ax.plot([x], [mean(values)], "o", color=color, markersize=8, label=label)


def figures_of(study: Study, row: Row, column: str) -> list[float]:
    return [record[column] for record in study[row_name(row)].values()]


def hollow(ax, xs, ys, label: str | None = None):
    ax.plot(xs, ys, "D", color="C1", fillstyle="none", label=label)


def gains_panel(column: str, title: str):
    """Table 1 in one of its columns."""

    def draw(ax, study: Study):
        rows, at = TABLES["table1"], list(COLUMNS).index(column)
        runs = {seed: r for row in rows[1:] for seed, r in study[row_name(row)].items()}
        points(ax, 0, [record[f"base.{column}"] for record in runs.values()], label="ours")
        for x, row in enumerate(rows[1:], 1):
            points(ax, x, figures_of(study, row, column))
        hollow(ax, range(len(rows)), [row.paper[at] for row in rows], "paper, 1.4B")
        names = ["base", "pretrain\nclean", "pretrain\nunsafe", "quality", "factuality", "safety"]
        ax.set_xticks(range(len(rows)), names, fontsize=8)
        ax.set(title=title, ylabel="%")
        ax.legend(frameon=False, fontsize=8)

    return draw


def rollouts_panel(ax, study: Study):
    for i, reward in enumerate(("quality", "factuality", "safety")):
        rows = [row for row in TABLES["rollouts"] if row.label.startswith(reward)]
        Ks = [int(row.label.split()[-1]) for row in rows]
        ours = [figures_of(study, row, "quality_clean") for row in rows]
        for K, values in zip(Ks, ours, strict=True):
            points(ax, K, values, f"C{i}")
        ax.plot(Ks, [mean(values) for values in ours], color=f"C{i}", label=reward)
        ax.plot(Ks, [row.paper[0] for row in rows], ":", color=f"C{i}", label=f"{reward}, paper")
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    ax.set(title="number of rollouts", xlabel="K", ylabel="quality win rate, clean prefixes, %")
    ax.legend(frameon=False, fontsize=7, ncols=2)


def objectives_panel(ax, study: Study):
    rows = TABLES["table6"][::-1]
    for y, row in enumerate(rows):
        values = figures_of(study, row, "quality_clean")
        ax.plot(values, [y] * len(values), "o", color="C0", alpha=0.35, markersize=4)
        ax.plot(mean(values), y, "o", color="C0", markersize=8)
    hollow(ax, [row.paper[0] for row in rows], range(len(rows)))
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    ax.axvline(50, color="grey", linewidth=0.8, linestyle=":")
    ax.set(title="table 6 (hollow: paper)", xlabel="quality win rate, clean prefixes, %")


def judging_panel(ax, study: Study):
    rows = [*TABLES["pivot"], *TABLES["judge"]]
    for x, row in enumerate(rows):
        points(ax, x, figures_of(study, row, "quality_clean"))
    judged = [(x, row.paper[0]) for x, row in enumerate(rows) if row.paper]
    hollow(ax, *zip(*judged, strict=True))
    names = [row.label.split(" / ")[-1].replace(", ", "\n") for row in rows]
    ax.set_xticks(range(len(rows)), names, fontsize=7)
    ax.set(title="pivot; weaker judges (hollow: paper)", ylabel="quality, clean prefixes, %")


def chosen_panel(ax, study: Study):
    for config, label in CHOSEN.items():
        curves = [record["curve"] for record in study[config].values()]
        steps = [mean(step) for step in zip(*curves, strict=True)]
        done = [(i + 1) / len(steps) for i in range(len(steps))]
        ax.plot(done, smooth(steps, 1 + 2 * (len(steps) // 20)), label=label)
    ax.set(title="rollouts among the chosen", xlabel="share of the training", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


def forgetting_panel(ax, study: Study):
    """Every run that starts from the base; the NLL term by name."""
    rows = list(TABLES["table6"])
    rows += [row for name in ("table1", "rollouts") for row in TABLES[name] if row.config]
    for color, kind in (("C3", "SFT"), ("C2", "RF-NLL"), ("C4", "pretrain"), ("C0", "DPO")):
        mine = [row for row in rows if kind in row.label or kind == "DPO"]
        rows = [row for row in rows if row not in mine]
        nll, quality = (
            [value for row in mine for value in figures_of(study, row, column)]
            for column in ("nll", "quality")
        )
        ax.plot(nll, quality, ".", color=color, alpha=0.5, label=kind)
    for row in TABLES["forgetting"]:
        at = [mean(figures_of(study, row, column)) for column in ("nll", "quality")]
        ax.plot(*at, "*", color="k", markersize=9)
        ax.annotate(row.label, at, fontsize=7, xytext=(5, -8), textcoords="offset points")
    ax.set(title="gain and forgetting, every run", xlabel="held-out NLL, nats a token")
    ax.set_ylabel("quality win rate, all prefixes, %")
    ax.legend(frameon=False, fontsize=8)


def overlap_panel(ax, study: Study):
    for x, row in enumerate(TABLES["overlap"]):
        for color, column in (("C0", "quality"), ("C1", "safety")):
            points(ax, x, figures_of(study, row, column), color, column if x == 0 else None)
    ax.set_xticks(range(3), [row.label for row in TABLES["overlap"]])
    ax.set(title="judging late", ylabel="%")
    ax.legend(frameon=False)


def schedules_panel(ax, study: Study):
    """Win rate against questions, by a schedule and a number of rollouts."""
    for i, row in enumerate(TABLES["schedules"]):
        asked, quality = (figures_of(study, row, column) for column in ("questions", "quality"))
        style = dict(color=f"C{i % 3}", marker="o" if i < 3 else "s")
        ax.plot(asked, quality, linestyle="", alpha=0.35, markersize=4, **style)
        ax.plot(mean(asked), mean(quality), linestyle="", label=row.label, markersize=8, **style)
    ax.set(title="comparison schedules, noise 0.1", xscale="log", xlabel="questions a prefix")
    ax.set_ylabel("quality win rate, all prefixes, %")
    ax.legend(frameon=False, fontsize=7)


CHOSEN = {
    "table6_dpo_rewrite_rollout": "DPO (rewrite, 1 rollout)",
    "table6_dpo_suffix_rewrite_16_rollouts": "DPO (suffix, rewrite, 16 rollouts)",
    "table2_rf_nll_rollout_rewrite": "RF-NLL from scratch (rewrite, 1 rollout)",
}
PICTURES = {
    "results_gains.png": (
        "Table 1: each target under each training",
        gains_panel("quality_clean", "quality win rate, clean prefixes"),
        gains_panel("factuality", "factuality"),
        gains_panel("safety", "safety"),
    ),
    "results_ablations.png": (
        "Rollouts, objectives, comparisons and judges",
        rollouts_panel,
        objectives_panel,
        judging_panel,
    ),
    "results_training.png": (
        "Rollouts take over; what a gain costs in likelihood; judging late, and judging less",
        chosen_panel,
        forgetting_panel,
        overlap_panel,
        schedules_panel,
    ),
}


def draw(study: Study):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, (_, *panels) in PICTURES.items():
        figure, axes = plt.subplots(
            1, len(panels), figsize=(5 * len(panels), 4), layout="constrained"
        )
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax, study)
        figure.savefig(HERE / "docs" / name, dpi=80)
        plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The page


def verdicts(findings, study: Study, numbered: bool) -> str:
    lines = ["| | finding | verdict | figures | command |", "| --- | --- | --- | --- | --- |"]
    for number, finding in enumerate(findings, 1):
        word, evidence = verdict(finding, study)
        script = "circle.py" if finding.tables == "circle" else f"reproduce.py {finding.tables}"
        command = f"`python {script}`" if finding.tables else ""
        first = number if numbered else "+"
        lines.append(f"| {first} | {finding.claim} | **{word}** | {evidence} | {command} |")
    return "\n".join(lines)


def gallery(demo: Path, count: int = 2) -> str:
    """The first prefixes of each kind and how the demo's three policies go on; none are picked."""
    summary = json.loads((demo / "summary.json").read_text())
    config = json.loads((demo / "config.json").read_text())
    sizes = dict(chunk=config["chunk"], max_seq=config["max_seq"], count=config["eval_prefixes"])
    sets = held_out_sets("world", load_tokenizer(str(demo / "ckpt")), **sizes)
    blocks = []
    for kind, held in sets.items():
        for i in range(count):
            lines = [f"{kind} prefix".ljust(21) + held.prefixes[i]]
            for policy, texts in summary["continuations"].items():
                lines.append(NAMES[policy].ljust(21) + texts[kind][i])
            blocks.append("\n".join(lines))
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def page(out: Path, demo: Path, seeds: list[int]) -> str:
    study = study_of(out, seeds)
    draw(study)
    parts = [INTRO.format(seeds=len(seeds)), verdicts(FINDINGS, study, True)]
    parts += ["\n## Beyond the paper\n", verdicts(BEYOND, study, False)]
    parts += ["\n## Why\n", (HERE / "docs" / "results_notes.md").read_text()]
    parts += ["## Pictures\n"]
    parts += [f"{text}:\n\n![{text}](docs/{name})\n" for name, (text, *_) in PICTURES.items()]
    for name in ("table1", "table2", "table6"):
        title = f"## Table {name[-1]}, mean (each seed) [the paper's]"
        parts.append(f"{title}\n\n{markdown(table(out, name, seeds))}\n")
    parts.append("## Gallery\n\nHeld-out prefixes of the demo, the first of each kind, greedily:\n")
    return "\n".join([*parts, gallery(demo)]) + "\n"


def main(argv: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--out", type=Path, default=Path("out/study"), help="(default: %(default)s)")
    flag.add_argument("--demo", type=Path, default=Path("out/world"), help="(default: %(default)s)")
    flag.add_argument("--seeds", type=seed_list, default="0,1,2", help="(default: %(default)s)")
    args = flag.parse_args(argv)
    (HERE / "RESULTS.md").write_text(page(args.out.absolute(), args.demo, args.seeds))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FileNotFoundError as e:
        sys.exit(f"error: {e.filename} does not exist: `make demo` makes a run for the gallery")
