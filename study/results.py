"""A page of results with pictures, RESULTS.md, and the study's figures on the other pages.

    python -m study.results     what is not finished is said to be missing

In: the runs of study.reproduce; results.md, the page's words. Out: record.json, per row and seed
the figures and per finding the verdict, which is committed; from it alone RESULTS.md (but for its
gallery, texts of the demo) and, in README.md and docs/, whatever stands between
`<!-- study TEMPLATE -->` and `<!-- end -->`; docs/results_*.png, frontier.png and hacking.png.

In a template {table1} is a table and {ROW HOW: COLUMN ...} are figures of a row, as cells of a
table: means over seeds, or by HOW those of `each` seed or of one seed, `both`: mean (clean /
unsafe). rel.X is the gain over the base's X in % of that. tests/test_reproduce.py fills all of
them in again.
"""

import json
import re
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from math import nan
from pathlib import Path

import numpy as np

from evaluation.results import LIKELIHOODS, NAMES
from evaluation.sets import held_out_sets
from study import frontier
from study.findings import Study, load, verdict
from study.reproduce import COLUMNS, OWN, TABLES, Row, as_markdown, base_of, flags, rows_of, table
from support import command
from support.command import ROOT, UserError
from support.files import markdown, read_jsonl, write_text
from support.tokenizer import load_tokenizer
from tools.bench_judge import FACTUALITY, LABELS, ask_world, questions, world_samples
from tools.plot import figure_of, read_json, smooth

Tables = dict[str, dict[Row, dict[int, dict]]]  # records by row and seed, of reproduce.py
RECORD = Path(__file__).with_name("record.json")
KEPT = (*COLUMNS, "quality", "factuality_clean", "chosen.first", "chosen.last")  # in the record
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- study\n(.*?)-->\n)(.*?)(?=<!-- end -->)", re.S)
FIELD = re.compile(r"\{(\w+(?::[\w.]+)?)((?: \w+)*)(?:: ([\w. ]+))?\}")


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


# ---- The record ---------------------------------------------------------------------------------


def strictness(count: int = 200) -> dict[str, dict]:
    """Rows of finding 15, a value a sample: what the pocket world's teacher calls a definite
    hallucination by each wording if it knows half of the facts, and whether one that knows all of
    them says the same, with a reference and without."""
    asked = [each for each in questions(world_samples(count)) if each[2] == "factuality"]
    told = [ask_world(asked, dict(reads=1, judge_knowledge=x)) for x in (0.5, 1.0)]
    half, whole = (  # [samples, wordings]
        np.array([label for *_, label in each]).reshape(-1, len(FACTUALITY)) for each in told
    )
    names = [name.replace("no-ref", "noref").replace(" ", "_") for name in FACTUALITY]
    rows = {name: {"definite": 100.0 * (half[:, n] == LABELS[0])} for n, name in enumerate(names)}
    for kind in ("ref", "noref"):
        own = [n for n, name in enumerate(names) if name.startswith(f"{kind}_")]
        rows[kind] = {"agreement": 100.0 * (half == whole)[:, own].mean(1)}
    return {
        f"strictness:{row}": {0: {"values": {c: {"samples": x} for c, x in each.items()}}}
        for row, each in rows.items()
    }


def record_of(tables: Tables, study: Study, out: Path) -> dict:
    """record.json: {"tables": {table: {"columns", "rows": {row: {seed: figures}}}}, "verdicts" in
    the order of findings.txt, "hacking": its table, "hours" of one core, all steps together}."""
    found: dict = {}
    for name, rows in tables.items():
        there = {c for runs in rows.values() for r in runs.values() for c in r}
        columns = [c for c in sorted(there - {"curve", "values"}) if not c.startswith("base.")]
        columns = [c for c in columns if c in KEPT or name in OWN]

        def line(ours: dict, columns=columns) -> list:
            return [round(ours[c], 3) if c in ours else None for c in columns]

        cells = {r.name: {s: line(x) for s, x in runs.items()} for r, runs in rows.items() if runs}
        found[name] = {"columns": columns, "rows": cells}
    seconds = sum(line["seconds"] for line in read_jsonl(out / "steps.jsonl"))
    verdicts = [verdict(finding, study) for finding in load()]
    told = out / "hacking.md"
    hacking = told.read_text(encoding="utf-8").strip() if told.exists() else ""
    hours = round(seconds / 3600, 1)
    return {"hours": hours, "verdicts": verdicts, "hacking": hacking, "tables": found}


def recorded(record: dict) -> Tables:
    """The tables of a record."""
    tables: Tables = {}
    for name in TABLES:
        kept = record["tables"].get(name, {"rows": {}})
        tables[name] = {
            row: {
                int(seed): {
                    c: v for c, v in zip(kept["columns"], each, strict=True) if v is not None
                }
                for seed, each in kept["rows"].get(row.name, {}).items()
            }
            for row in rows_of(name)
        }
    base = tables["demo"][rows_of("demo")[0]]
    for runs in (runs for found in tables.values() for runs in found.values()):
        for seed, ours in runs.items():  # every run's base is its seed's
            ours |= {f"base.{column}": value for column, value in base.get(seed, {}).items()}
    return tables


# ---- The pages ----------------------------------------------------------------------------------


def figures(tables: Tables, key: str, how: list[str], columns: str) -> str:
    """{ROW HOW: COLUMN ...}; KeyError where a run is missing."""
    runs = {row.key: runs for found in tables.values() for row, runs in found.items()}[key]
    runs = {int(word): runs[int(word)] for word in how if word.isdigit()} or runs
    if not runs:
        raise KeyError(key)

    def show(column: str) -> str:
        name, digits = column.removeprefix("rel."), 2 if column.startswith(LIKELIHOODS) else 1
        values = [record[name] for record in runs.values()]
        if name != column:
            base = mean([record[f"base.{name}"] for record in runs.values()])
            return f"{100 * (mean(values) / base - 1):+.0f}"
        if "each" in how:
            return ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{mean(values):.{digits}f}"

    cells = [show(column) for column in columns.split()]
    if "both" in how:
        pairs = [f"{show(c + '_clean')} / {show(c + '_unsafe')}" for c in columns.split()]
        cells = [f"{cell} ({pair})" for cell, pair in zip(cells, pairs, strict=True)]
    return " | ".join(cells)


def fill(template: str, tables: Tables, parts: dict[str, str], missing: str = "") -> str:
    """A template with its figures; KeyError where one lacks, unless `missing` stands for it."""

    def field(match) -> str:
        name, how, columns = match.groups()
        try:
            return figures(tables, name, how.split(), columns) if columns else parts[name]
        except KeyError:
            if missing:
                return missing
            raise

    return FIELD.sub(field, template)


def verdicts(section: str, record: dict) -> str:
    """A row a finding, the reasons of its number below it."""
    rows: list[list] = [["", "finding", "verdict", "figures: margin (95 %)", "from"]]
    found = list(zip(load(), record["verdicts"], strict=True))
    numbers = 0
    for finding, (word, evidence) in found:
        if finding.section == section:
            numbers += 1
            number = str(numbers) if section == "paper" else "+"
            rows.append([number, finding.claim, f"**{word}**", evidence, ", ".join(finding.tables)])
            for why, (answer, figures) in found:
                if why.claim.startswith(f"({number}) "):
                    claim = f"*why?* {why.claim.partition(') ')[2]}"
                    rows.append(["", claim, answer, figures, ", ".join(why.tables)])
    return markdown(rows)


def gallery(run: Path) -> str:
    """Continuations of the demo on held-out prefixes: of each kind the first that the method won
    against the base, by the exact judge, and the first two that it lost."""
    summary, config = read_json(run / "summary.json"), read_json(run / "config.json")
    size = dict(chunk=config["chunk"], max_seq=config["max_seq"], count=config["eval_prefixes"])
    sets, shown = held_out_sets("world", load_tokenizer("world"), **size), []
    for worth, title in ((1, "Won"), (0, "Lost")):
        for kind, held in sets.items():
            values = summary["values"]["method"][kind]["quality"]
            found = [n for n, value in enumerate(values) if value == worth]
            lines = [f"{title}: {len(found)} of {len(values)} {kind} prefixes"]
            for n in found[: 1 + (worth == 0)]:
                texts = {name: texts[kind][n] for name, texts in summary["continuations"].items()}
                texts = {f"{kind} prefix": held.prefixes[n]} | {
                    NAMES[p]: t for p, t in texts.items()
                }
                lines += [f"{name:<20} {text.strip()}" for name, text in texts.items()] + [""]
            shown.append("\n".join(lines))
    return "```text\n" + "\n".join(shown).rstrip() + "\n```\n"


def page(record: dict, tables: Tables) -> str:
    """RESULTS.md without its gallery."""
    parts = {name: as_markdown(found) for name, found in tables.items()}
    parts |= {"hours": str(record["hours"])}
    parts |= {section: verdicts(section, record) for section in ("paper", "beyond")}
    frame = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return fill(frame, tables, parts, missing="-")


def rewritten(text: str, tables: Tables, hacking: str) -> tuple[str, list[str]]:
    """(a page with its blocks filled in again, what they lack); such a block is left as it is.
    hacking: the table of study.hacking."""
    lacking, rows = [], tables["frontier"] | tables["between"]
    parts = {"frontier": as_markdown(frontier.numbered(rows))} if all(rows.values()) else {}
    parts |= {"hacking": hacking} if hacking else {}

    def again(match) -> str:
        try:
            return match[1] + fill(match[2], tables, parts)
        except KeyError as missing:
            lacking.append(str(missing))
            return match[0]

    return BLOCK.sub(again, text), lacking


def main(arguments: list[str]):
    args = flags(__doc__).parse_args(arguments)
    out = args.out.absolute()
    tables = {name: table(name, args) for name in TABLES}
    if not any(runs for found in tables.values() for runs in found.values()):
        raise UserError(f"{out} has no finished run: see study.reproduce, or name another --out")
    study = Study({row.key: runs for found in tables.values() for row, runs in found.items()})
    study.seeds, study.more = tuple(args.seeds), tuple(args.more)
    study.update(strictness())
    record = record_of(tables, study, out)
    lines = ",\n".join(f' "{name}": {json.dumps(part)}' for name, part in record["tables"].items())
    others = {name: record[name] for name in ("hours", "hacking", "verdicts")}
    write_text(RECORD, f'{json.dumps(others, indent=0)[:-2]},\n"tables": {{\n{lines}\n}}}}\n')
    for name, panels in PICTURES.items():
        figure_of(ROOT / "docs" / name, [partial(panel, tables=tables) for panel in panels])
    frontier.picture(ROOT / "docs" / "frontier.png", tables["frontier"] | tables["between"])
    if (drawn := out / "hacking.png").exists():
        shutil.copy(drawn, ROOT / "docs")
    record = read_json(RECORD)
    tables = recorded(record)
    run = base_of(out, args.seeds[0])
    shown = gallery(run) if (run / "summary.json").exists() else "(the demo is not finished)\n"
    write_text(ROOT / "RESULTS.md", page(record, tables) + shown)
    for path in PAGES:
        text, lacking = rewritten(path.read_text(encoding="utf-8"), tables, record["hacking"])
        write_text(path, text)
        if lacking:
            print(f"{path.name}: left as it was, not finished: {', '.join(lacking)}")


if __name__ == "__main__":
    command.run(main)
