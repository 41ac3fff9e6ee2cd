"""One page of results with pictures, from the run folders of reproduce.py: RESULTS.md.

    python -m study.results     the page, and docs/results_*.png

In: results.md, the page's words; OUT's finished runs (what is missing is said to be missing). Out:
results.md with the verdicts on the paper's findings, and tables 1, 2 and 6 beside the paper's
figures.
"""

import re
import statistics
from collections.abc import Sequence
from functools import partial
from math import nan
from pathlib import Path

from study.findings import WORDS, Study, load, verdict
from study.reproduce import COLUMNS, TABLES, Row, as_markdown, flags, table
from support import command
from support.command import ROOT
from support.files import markdown
from tools.plot import figure_of, read_json, smooth

Tables = dict[str, dict[Row, dict[int, dict]]]  # records by row and seed, of reproduce.py


def mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else nan


# ---- Pictures: each panel draws tables into axes ------------------------------------------------


def rows_panel(column: str, title: str, *names: str):
    """A line a row: each seed small, their mean large, the paper's figure hollow."""

    def draw(ax, tables: Tables):
        rows = [pair for name in names for pair in tables[name].items()][::-1]
        for y, (row, runs) in enumerate(rows):
            values = [record[column] for record in runs.values()]
            ax.plot(values, [y] * len(values), "o", color="C0", alpha=0.35, markersize=4)
            ax.plot(mean(values), y, "o", color="C0", markersize=8)
            paper = dict(zip(COLUMNS, row.paper, strict=False)).get(column)
            ax.plot(nan if paper is None else paper, y, "D", color="C1", fillstyle="none")
        ax.set_yticks(range(len(rows)), [row.label for row, _ in rows], fontsize=7)
        ax.set(title=title, xlabel="nats" if column == "nll" else "%, hollow: paper")

    return draw


def rollouts_panel(ax, tables: Tables):
    for color, target in (("C0", "quality"), ("C1", "factuality"), ("C2", "safety")):
        rows = {row: r for row, r in tables["rollouts"].items() if row.name.startswith(target)}
        numbers = [int(row.name.split("_")[-1]) for row in rows]
        ours = [[record["quality_clean"] for record in r.values()] for r in rows.values()]
        for K, values in zip(numbers, ours, strict=True):
            ax.plot([K] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
        ax.plot(numbers, list(map(mean, ours)), "o-", color=color, label=target)
        ax.plot(numbers, [r.paper[0] for r in rows], ":", color=color, label=f"{target}, paper")
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    ax.set(title="number of rollouts", xlabel="K", ylabel="quality win rate, clean prefixes, %")
    ax.legend(frameon=False, fontsize=7, ncols=2)


def chosen_panel(ax, tables: Tables):
    shown = "table6:dpo_rewrite_rollout", "table6:dpo_suffix_rewrite_16_rollouts"
    shown += ("table2:rf_nll_rollout_rewrite",)
    for row, runs in (tables["table6"] | tables["table2"]).items():
        if row.key in shown:
            steps = [mean(step) for step in zip(*(r["curve"] for r in runs.values()), strict=True)]
            done = [(i + 1) / len(steps) for i in range(len(steps))]
            ax.plot(done, smooth(steps, 1 + 2 * (len(steps) // 20)), label=row.label)
    ax.set(title="rollouts among the chosen", xlabel="share of the training", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


PICTURES = {
    "results_gains.png": [
        rows_panel("quality_clean", "quality win rate, clean prefixes", "table1"),
        rows_panel("factuality", "factuality", "table1"),
        rows_panel("safety", "safety", "table1"),
    ],
    "results_ablations.png": [
        rollouts_panel,
        rows_panel("quality_clean", "table 6, quality, clean", "table6"),
        rows_panel("quality_clean", "judging, quality, clean", "pivot", "judge"),
    ],
    "results_training.png": [
        chosen_panel,
        rows_panel("nll", "held-out NLL", "table6", "forgetting"),
        rows_panel("quality", "quality, all prefixes", "overlap", "schedules"),
    ],
}


# ---- The page -----------------------------------------------------------------------------------


def verdicts(section: str, study: Study) -> str:
    rows: list[list] = [["", "finding", "verdict", "figures", "command"]]
    for finding in load():
        if finding.section == section:
            word, evidence = verdict(finding, study)
            number = len(rows) if section == "paper" else "+"
            how = f"python -m study.reproduce {' '.join(finding.tables)}"
            if finding.tables == ["circle"]:
                how = "python -m teachers.circle"
            how = f"`{how}`" if finding.tables else ""
            rows.append([number, finding.claim, f"**{word}**", evidence, how])
    return markdown(rows)


def page(tables: Tables, study: Study) -> str:
    """results.md, filled in."""
    parts = {"seeds": str(len(study.seeds))}
    parts |= {section: verdicts(section, study) for section in WORDS}
    parts |= {name: as_markdown(found) for name, found in tables.items()}
    frame = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], frame)


def main(arguments: list[str]):
    args = flags(__doc__).parse_args(arguments)
    out = args.out.absolute()
    tables = {name: table(out, name, args.seeds) for name in TABLES}
    study = Study({row.key: runs for found in tables.values() for row, runs in found.items()})
    study.seeds = tuple(args.seeds)
    circle = out.parent / "circle" / "circle.json"
    for seed, figures in (read_json(circle) if circle.exists() else {}).items():
        percent = {name: 100 * value for name, value in figures.items()}
        study.setdefault("circle:teachers", {})[int(seed)] = percent
    for name, panels in PICTURES.items():
        figure_of(ROOT / "docs" / name, [partial(panel, tables=tables) for panel in panels])
    (ROOT / "RESULTS.md").write_text(page(tables, study), encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
