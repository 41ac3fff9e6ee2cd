"""One page of results with pictures, from the run folders of reproduce.py: RESULTS.md.

    python -m study.results [--demo RUN]     the page, and docs/results_*.png

In: OUT's finished runs (what is missing is said to be missing), docs/results_notes.md (comments by
hand), and a run of the demo for the gallery. Out: verdicts on the paper's findings, pictures,
tables 1, 2 and 6 beside the paper's figures, and the same prefixes continued by three policies.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from math import nan
from pathlib import Path

from evaluation.results import NAMES
from evaluation.sets import held_out_sets
from study import reproduce
from study.findings import Study, load, verdict
from study.reproduce import BASE, COLUMNS, TABLES, Row, rows_of
from support import command
from support.command import ROOT, UserError
from support.files import markdown
from support.tokenizer import load_tokenizer
from tools.plot import figure_of, read_json, read_summary, smooth

INTRO = """\
# Results

The paper's findings, tested in miniature: a 0.4M-parameter policy on the pocket world, {seeds}
seeds, 40 steps of 16 prefixes (from scratch: 200 of 32). A row is the paper's configuration of that
row with only the scale changed, and the scale is the same for all rows; the rule for each verdict
([findings.txt](study/findings.txt), [findings.py](study/findings.py)) was fixed early, when one
quality run with 4 rollouts and the next-token rows had been seen; the test with a weak rewriter
came after table 6. The judge is exact unless a row says otherwise, and the judge of the evaluation
always is. So this tests the method's mechanics, not how much a real model gains. Quality and
coherence are win rates in % against the seed's base; the spread is the standard deviation of the
difference over seeds. "As good as" and "no harm" mean that no loss beyond the spread was seen, not
that there is none.

    python -m study.reproduce all      # what is missing in out/study; interrupted, it goes on
    python -m study.results            # this page
"""


def study_of(out: Path, seeds: list[int]) -> Study:
    """Records of all rows by "table:row", and the circle's figures in %."""
    rows = [row for name in TABLES for row in rows_of(name)]
    study = Study({row.key: reproduce.records(out, row, seeds) for row in rows})
    study.seeds = tuple(seeds)
    circle = out.parent / "circle" / "circle.json"
    found = read_json(circle) if circle.exists() else {}
    study["circle:teachers"] = {
        int(seed): {name: 100 * value for name, value in figures.items()}
        for seed, figures in found.items()
    }
    return study


# ---- Pictures -----------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else nan


def figures_of(study: Study, row: Row, column: str) -> list[float]:
    """Of a row's finished seeds; of the base, those of the runs that were compared with it."""
    if row.name:
        return [record[column] for record in study[row.key].values()]
    runs = {seed: r for other in rows_of(row.table) for seed, r in study[other.key].items()}
    return [record[f"base.{column}"] for record in runs.values()]


def rows_panel(column: str, title: str, *tables: str):
    """A line a row: each seed small, their mean large, the paper's figure hollow."""

    def draw(ax, study: Study):
        rows = [row for name in tables for row in rows_of(name)][::-1]
        rows += [Row(name, "", "base", BASE[name]) for name in tables if name in BASE]
        for y, row in enumerate(rows):
            values = figures_of(study, row, column)
            ax.plot(values, [y] * len(values), "o", color="C0", alpha=0.35, markersize=4)
            ax.plot(mean(values), y, "o", color="C0", markersize=8)
            paper = dict(zip(COLUMNS, row.paper, strict=False)).get(column)
            ax.plot(nan if paper is None else paper, y, "D", color="C1", fillstyle="none")
        ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
        ax.set(title=title, xlabel="nats" if column == "nll" else "%, hollow: paper")

    return draw


def rollouts_panel(ax, study: Study):
    for color, target in (("C0", "quality"), ("C1", "factuality"), ("C2", "safety")):
        rows = [row for row in rows_of("rollouts") if row.name.startswith(target)]
        numbers = [int(row.name.split("_")[-1]) for row in rows]
        for K, row in zip(numbers, rows, strict=True):
            values = figures_of(study, row, "quality_clean")
            ax.plot([K] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
        ours = [mean(figures_of(study, row, "quality_clean")) for row in rows]
        ax.plot(numbers, ours, "o-", color=color, label=target)
        ax.plot(numbers, [r.paper[0] for r in rows], ":", color=color, label=f"{target}, paper")
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    ax.set(title="number of rollouts", xlabel="K", ylabel="quality win rate, clean prefixes, %")
    ax.legend(frameon=False, fontsize=7, ncols=2)


def chosen_panel(ax, study: Study):
    rows = {row.name: row for row in rows_of("table6")}
    shown = [rows["dpo_rewrite_rollout"], rows["dpo_suffix_rewrite_16_rollouts"]]
    for row in [*shown, rows_of("table2")[-1]]:
        curves = [record["curve"] for record in study[row.key].values()]
        steps = [mean(step) for step in zip(*curves, strict=True)]
        done = [(i + 1) / len(steps) for i in range(len(steps))]
        ax.plot(done, smooth(steps, 1 + 2 * (len(steps) // 20)), label=row.label)
    ax.set(title="rollouts among the chosen", xlabel="share of the training", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


PICTURES = {
    "results_gains.png": (
        "Table 1: each target under each training",
        rows_panel("quality_clean", "quality win rate, clean prefixes", "table1"),
        rows_panel("factuality", "factuality", "table1"),
        rows_panel("safety", "safety", "table1"),
    ),
    "results_ablations.png": (
        "Rollouts, objectives, comparisons and judges",
        rollouts_panel,
        rows_panel("quality_clean", "table 6, quality, clean", "table6"),
        rows_panel("quality_clean", "judging, quality, clean", "pivot", "judge"),
    ),
    "results_training.png": (
        "Rollouts take over; what a gain costs in likelihood; judging late, and judging less",
        chosen_panel,
        rows_panel("nll", "held-out NLL", "table6", "forgetting"),
        rows_panel("quality", "quality, all prefixes", "overlap", "schedules"),
    ),
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


def gallery(demo: Path, count: int = 2) -> str:
    """The first prefixes of each kind and how the demo's three policies go on; none are picked."""
    summary = read_summary(demo)
    if not summary.get("continuations"):
        raise UserError(f"{demo} is no finished run for the gallery: `make demo` makes one")
    config = read_json(demo / "config.json")
    sizes = {"chunk": config["chunk"], "max_seq": config["max_seq"]}
    tokenizer, blocks = load_tokenizer(str(demo / "ckpt")), []
    sets = held_out_sets("world", tokenizer, count=config["eval_prefixes"], **sizes)
    for kind, held in sets.items():
        for i in range(count):
            lines = [f"{kind} prefix".ljust(21) + held.prefixes[i]]
            for policy, texts in summary["continuations"].items():
                lines.append(NAMES[policy].ljust(21) + texts[kind][i])
            blocks.append("\n".join(lines))
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def page(out: Path, demo: Path, seeds: list[int]) -> str:
    study, examples = study_of(out, seeds), gallery(demo)
    parts = [INTRO.format(seeds=len(seeds)), verdicts("paper", study)]
    parts += ["\n## Beyond the paper\n", verdicts("beyond", study)]
    notes = ROOT / "docs" / "results_notes.md"
    parts += ["\n## Why\n", notes.read_text(encoding="utf-8"), "## Pictures\n"]
    for name, (text, *panels) in PICTURES.items():
        path = ROOT / "docs" / name
        figure_of(path, [partial(panel, study=study) for panel in panels])
        parts.append(f"{text}:\n\n![{text}](docs/{name})\n")
    for name in ("table1", "table2", "table6"):
        title = f"## Table {name[-1]}, mean (each seed) [the paper's]"
        parts.append(f"{title}\n\n{reproduce.as_markdown(reproduce.table(out, name, seeds))}\n")
    parts.append("## Gallery\n\nHeld-out prefixes of the demo, the first of each kind, greedily:\n")
    return "\n".join([*parts, examples]) + "\n"


def main(arguments: list[str]):
    flag = reproduce.flags(__doc__)
    flag.add_argument("--demo", type=Path, default=Path("out/world"), help="(default: %(default)s)")
    args = flag.parse_args(arguments)
    text = page(args.out.absolute(), args.demo, args.seeds)
    (ROOT / "RESULTS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
