"""The paper's findings, claimed in findings.txt: how conditions are read, and turned into verdicts.

In: {"table:row": {seed: record}}, the records of reproduce.py; the figures of teachers.circle are
row "circle:teachers". Out: for each finding a verdict and the figures that it rests on.

A condition is "COLUMN: ROW ..." and speaks of that column of the rows; the column gain.X is X less
the base's. A row may also be `its OTHER_COLUMN`. Each asks that a margin is above 0:

A above B                A - B; a number in place of B is meant as it stands (`below` likewise)
A not below B by 5       A - B + 5: a loss of five points is excluded
A at most 0.6 of B       0.6 B - A; `over 0.8 of`: A - 0.8 B
A within 0.2 of B        both 0.2 B - A and 0.2 B + A
A from 40 to 60          both A - 40 and 60 - A; of two the one that reaches lower is shown
A B C rising             C - A; and the means fall at most once

All policies continue the same prefixes, so a margin is taken prefix by prefix and seed by seed. Its
95 % interval is a bootstrap: seeds are drawn anew, and prefixes, the same for all. (What has one
value a seed, nats and shares of the chosen, is drawn over seeds alone.) yes: the interval lies
above 0; no: below; else the condition is open, which is no yes. It is too narrow with few seeds: it
holds the true mean in 75 of 100 studies with three, in 84 with five, where seeds differ much more
than prefixes (20,000 simulated). So a yes of three seeds means little more than: in all of them.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

WORDS = {  # by section: all conditions hold, none does, some do
    "paper": ("reproduced", "not reproduced", "partly reproduced"),
    "why": ("holds", "does not hold", "holds in part"),
    "beyond": ("holds", "does not hold", "holds in part"),
}
TIMES = 2000  # that a bootstrap draws anew
Sample = list[list[np.ndarray]]  # of each seed and kind of prefix: a value a prefix, or one alone


class Finding(NamedTuple):
    section: str
    claim: str
    tables: list[str]  # the first is that of rows without one
    more: str  # "five seeds", or "built in": a property of the pocket world, measured once
    conditions: list[str]  # "what | condition"


def load() -> list[Finding]:
    findings: list[Finding] = []
    section, file = "", Path(__file__).with_name("findings.txt")
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            findings[-1].conditions.append(line.strip())
        elif line.endswith("]"):
            claim, _, about = line[:-1].rpartition(" [")
            tables, _, more = about.partition("; ")
            findings.append(Finding(section, claim, tables.split(), more, []))
        else:
            section = line
    return findings


def rows_of_five_seeds() -> set[str]:
    """ "table:row" of every row that a finding with five seeds speaks of."""
    rules, found = re.compile(r"its \S+|\b(above|not|below|by|at|most|of|rising|[\d.]+)\b"), set()
    for finding in load():
        for condition in finding.conditions if finding.more == "five seeds" else ():
            rows = rules.sub("", condition.partition(" | ")[2].partition(": ")[2]).split()
            found |= {row if ":" in row else f"{finding.tables[0]}:{row}" for row in rows}
    return found


class Missing(Exception):
    """A row has runs that are not finished."""


class Study(dict):
    """{row: {seed: record}}; the seeds that every row should have, and further ones of those whose
    findings ask for five."""

    seeds: tuple[int, ...] = (0, 1, 2)
    more: tuple[int, ...] = (3, 4)

    def sample(self, row: str, column: str, seeds) -> Sample:
        """Of the seeds in order."""
        if set(seeds) - set(self.get(row, ())):
            raise Missing(row)
        return [self.values(self[row][seed], column) for seed in seeds]

    def values(self, record: dict, column: str) -> list[np.ndarray]:
        if column.startswith("gain."):
            name = column.removeprefix("gain.")
            pair = self.values(record, name), self.values(record, f"base.{name}")
            return [ours - base for ours, base in zip(*pair, strict=True)]
        suite, _, kind = column.rpartition("_")
        values = record.get("values", {})
        if column in values:
            return list(values[column].values())
        return [values[suite][kind] if suite in values else np.array([record[column]])]


def each(margin: Callable, *samples: Sample) -> Sample:
    """margin(a, b, ...) of each prefix of each seed."""
    seeds = zip(*samples, strict=True)
    return [[margin(*kinds) for kinds in zip(*seed, strict=True)] for seed in seeds]


def mean(sample: Sample) -> float:
    """The mean over seeds of the mean over kinds of prefix of the mean over prefixes."""
    return float(np.mean([np.mean([np.nanmean(kind) for kind in seed]) for seed in sample]))


def interval(sample: Sample) -> tuple[float, float]:
    """95 % of the means when seeds and prefixes are drawn anew."""
    rng, S, means = np.random.default_rng(0), len(sample), []
    for kind in zip(*sample, strict=True):  # a value a prefix, of each seed
        drawn = rng.integers(len(kind[0]), size=(TIMES, len(kind[0])))
        means.append([np.nanmean(values[drawn], axis=1) for values in kind])
    seeds, each = rng.integers(S, size=(S, TIMES)), np.arange(TIMES)
    of_all = np.mean(means, axis=0)[seeds, each].mean(0)  # [S, TIMES] -> [TIMES]
    low, high = np.quantile(of_all, [0.025, 0.975])
    return float(low), float(high)


def check(study: Study, table: str, condition: str, seeds=None) -> tuple[str, str]:
    """(yes, no or open; the figures it rests on, at last the margin and its interval)."""
    column, _, words = condition.partition(": ")
    first, *rest = words.split()
    digits = 2 if "nll" in column or "kl" in column else 1

    def of(name: str, its: str = "") -> Sample:
        row = first if its else name
        row = row if ":" in row else f"{table}:{row}"
        return study.sample(row, its or column, study.seeds if seeds is None else seeds)

    a, falls = of(first), 0
    told = f"{mean(a):.{digits}f}"
    match rest:
        case ["above" | "below" as rule, limit] if limit.replace(".", "").isdigit():
            margins = [each(lambda x: (x - float(limit)) * (1 if rule == "above" else -1), a)]
            told += f", asked {rule} {limit}"
        case ["above", *other]:
            b = of(*other)
            margins, told = [each(np.subtract, a, b)], f"{told} against {mean(b):.{digits}f}"
        case ["not", "below", *other, "by", limit]:
            b = of(*other)
            margins = [each(lambda x, y: x - y + float(limit), a, b)]
            told += f" against {mean(b):.{digits}f}, asked at most {limit} below"
        case ["at" | "over" | "within" as rule, *_, share, "of", other]:
            b = of(other)
            under = each(lambda x, y: float(share) * y - x, a, b)
            either = [under, each(lambda x, y: float(share) * y + x, a, b)]
            margins = dict(at=[under], over=[each(np.negative, under)], within=either)[rule]
            asked = {"at": "at most", "over": "over", "within": "either way within"}[rule]
            told += f", asked {asked} {share} of {mean(b):.{digits}f}"
        case ["from", low, "to", high]:
            margins = [each(lambda x: x - float(low), a), each(lambda x: float(high) - x, a)]
            told += f", asked from {low} to {high}"
        case [*others, "rising"]:
            rows = [a, *map(of, others)]
            margins, means = [each(np.subtract, rows[-1], a)], list(map(mean, rows))
            falls = sum(y < x for x, y in pairwise(means))
            told = f"{', '.join(f'{m:.{digits}f}' for m in means)} ({falls} falls, asked at most 1)"
        case _:
            raise ValueError(f"findings.txt: {condition!r} is no condition")
    found = [(*interval(margin), mean(margin)) for margin in margins]
    (low, high, middle), no = min(found), falls > 1 or any(high < 0 for _, high, _ in found)
    word = "no" if no else "yes" if low > 0 else "open"
    return word, f"{told}: {middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(finding: Finding, study: Study) -> tuple[str, str]:
    """(verdict, evidence)."""
    five = tuple(dict.fromkeys(study.seeds + study.more))
    seeds = {"five seeds": five, "built in": (0,)}.get(finding.more)
    found = []
    for line in finding.conditions:
        what, _, condition = line.partition(" | ")
        try:
            word, evidence = check(study, finding.tables[0], condition, seeds)
        except Missing as row:
            return "not run", f"{row}: not finished"
        found.append((word == "yes", f"{word}: {what} {evidence}"))
    held = [holds for holds, _ in found]
    word = WORDS[finding.section][0 if all(held) else 2 if any(held) else 1]
    word += ", as built in" if finding.more == "built in" else ""
    return word, "; ".join(evidence for _, evidence in found)
