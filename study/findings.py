"""The paper's findings, claimed in findings.txt: how conditions are read, and turned into verdicts.

In: {"table:row": {seed: record}}, the records of reproduce.py; the figures of teachers.circle are
row "circle:teachers". Out: for each finding a verdict and the figures that it rests on.

A condition is "COLUMN: ROW ..." and speaks of that column of the rows, a value a seed; the column
gain.X is X less the base's. A row may also be `its OTHER_COLUMN`.

A above B           in every seed, and on average by more than the standard deviation of the
                    difference over seeds
A not below B       B is not above A by that rule: three seeds showed no loss beyond their spread,
                    not that there is none
A at most 0.6 of B  of the means; `over 0.8 of` is the opposite
A within 0.2 of B   the mean is nearer to 0, on either side, than 0.2 times B's
A each below 25     the value of every seed; `above 90` and `from 40 to 60` likewise
A B C rising        the means fall at most once, and the last is above the first
"""

from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

WORDS = {  # by section: all conditions hold, none does, some do
    "paper": ("reproduced", "not reproduced", "partly reproduced"),
    "beyond": ("holds", "does not hold", "holds in part"),
}


class Finding(NamedTuple):
    section: str
    claim: str
    tables: list[str]  # the first is that of rows without one
    conditions: list[str]  # "what | condition"; without a "|": why it cannot be tested


def load() -> list[Finding]:
    findings: list[Finding] = []
    section, file = "", Path(__file__).with_name("findings.txt")
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            findings[-1].conditions.append(line.strip())
        elif line.endswith("]"):
            claim, _, tables = line[:-1].rpartition(" [")
            findings.append(Finding(section, claim, tables.split(), []))
        else:
            section = line
    return findings


class Missing(Exception):
    """A row has runs that are not finished."""


class Study(dict):
    """{row: {seed: record}}, and the seeds that every row should have."""

    seeds: tuple[int, ...] = (0, 1, 2)

    def values_of(self, row: str, column: str) -> list[float]:
        """Of the seeds in order."""
        if set(self.get(row, ())) != set(self.seeds):
            raise Missing(row)
        if column.startswith("gain."):
            name = column.removeprefix("gain.")
            pairs = zip(self.values_of(row, name), self.values_of(row, f"base.{name}"), strict=True)
            return [ours - base for ours, base in pairs]
        return [record[column] for _, record in sorted(self[row].items())]


def above(a: list[float], b: list[float], digits: int = 1) -> tuple[bool, str]:
    """(a is above b, the means, their difference and its spread over seeds; the least seed's where
    only that forbids it)."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    middle, least = mean(differences), min(differences)
    spread = stdev(differences) if len(differences) > 1 else 0.0
    forbids = f", least {least:+.{digits}f}" if least <= 0 and middle > spread else ""
    figures = f"{middle:+.{digits}f}{forbids}, spread {spread:.{digits}f}"
    told = f"{mean(a):.{digits}f} against {mean(b):.{digits}f} ({figures})"
    return least > 0 and middle > spread, told


def check(study: Study, table: str, condition: str) -> tuple[bool, str]:
    """(whether the condition holds, the figures and limits it rests on)."""
    column, _, words = condition.partition(": ")
    first, *rest = words.split()

    def of(name: str, its: str = "") -> list[float]:
        row = first if its else name
        return study.values_of(row if ":" in row else f"{table}:{row}", its or column)

    a, digits = of(first), 2 if column == "nll" else 1
    middle = mean(a)
    match rest:
        case ["above", *other]:
            return above(a, of(*other), digits)
        case ["not", "below", *other]:
            return not above(of(*other), a)[0], above(a, of(*other), digits)[1]
        case [*how, share, "of", other]:
            whole, rule = mean(of(other)), " ".join(how)
            limit, asked = float(share) * whole, f"{rule} {share} of {whole:+.1f}"
            if rule == "over":
                kept = 100 * middle / whole if whole else float("nan")
                share = 100 * float(share)
                return kept > share, f"{kept:.0f} % (asked: over {share:.0f} %)"
            if rule == "within":
                return abs(middle) < limit, f"{middle:+.1f} (asked: {asked}, either way)"
            return middle <= limit, f"{middle:+.1f} (asked: {asked})"
        case ["each", rule, low, *_]:
            holds = {"below": max(a) < float(low), "above": min(a) > float(low)}
            holds["from"] = float(low) <= min(a) and max(a) <= float(rest[-1])
            asked = f"asked: {' '.join(rest[1:])} in each seed"
            each = ", ".join(f"{value:.1f}" for value in a)
            return holds[rule], f"{middle:.1f} ({each}; {asked})"
        case [*others, "rising"]:
            rows = [a, *map(of, others)]
            means = [mean(values) for values in rows]
            falls, ends = sum(y < x for x, y in pairwise(means)), above(rows[-1], rows[0])[0]
            text = f"{', '.join(f'{m:.1f}' for m in means)} (falls: {falls}, asked: at most 1"
            text += "" if ends else "; the last is not above the first"
            return ends and falls <= 1, f"{text})"
    raise ValueError(f"findings.txt: {condition!r} is no condition")


def verdict(finding: Finding, study: Study) -> tuple[str, str]:
    """(verdict, evidence)."""
    found = []
    for line in finding.conditions:
        what, bar, condition = line.partition(" | ")
        if not bar:
            return "not testable in miniature", line
        try:
            holds, evidence = check(study, finding.tables[0], condition)
        except Missing as row:
            return "not run", f"{row}: not finished"
        found.append((holds, f"{'yes' if holds else 'no'}: {what} {evidence}"))
    held = [holds for holds, _ in found]
    word = WORDS[finding.section][0 if all(held) else 2 if any(held) else 1]
    return word, "; ".join(evidence for _, evidence in found)
