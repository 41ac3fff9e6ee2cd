"""The study: rows are configurations, runs are keyed, shared and resumed, verdicts follow rules,
and every figure of the pages is the record's."""

import json
from statistics import mean

import numpy as np
import pytest
from matplotlib.figure import Figure

import config as configuration
from study import findings, reproduce, results
from study.findings import Study, check, verdict
from study.reproduce import Row, Step, rows_of, steps_of
from support.command import ROOT, UserError
from support.runlog import lock
from tools.bench_judge import PAPER_ACCURACY
from world import corpus

ROWS = [row for name in reproduce.TABLES for row in rows_of(name)]
SCALED = [r for r in ROWS if r.table not in ("frontier", "hacking", "circle", "between")]
SCALED = [row for row in SCALED if not row.of_demo]
KINDS = ("quality", "coherence", "factuality", "safety", "nll", "nll_sound", "nll_faulty", "kl")
COLUMNS = [k + s for k in KINDS for s in ("", "_clean", "_unsafe")] + [
    "chosen.first",
    "chosen.last",
]
CIRCLE = [f"judge.{k}.{w}" for k in ("quality", "rollouts", "safety") for w in ("cold", "grpo")]
CIRCLE += [f"rewriter.{k}.{w}" for k in ("copied", "safe") for w in ("cold", "grpo")]
CIRCLE += [f"policy.{k}.{w}" for k in KINDS[:4] for w in ("base", "checkpoint")]


def row(name: str) -> Row:
    table, _, name = name.partition(":")
    return next(row for row in rows_of(table) if row.name == name)


def parse(*arguments: str):
    return configuration.parse([str(ROOT / "configs" / file) for file in arguments])[0]


def test_a_row_is_the_same_at_every_scale():
    """Of the paper's scale and ours, alone and with either."""
    for row in SCALED:
        file = f"{row.table}.py:{row.name}"
        scratch = "_scratch" if row.table == "table2" else ""
        own, paper = parse(file), parse(f"paper{scratch}.py", file)
        small, _ = configuration.parse(row.settings)
        assert (paper.chunk, paper.batch_size) == (128, 256) and paper.data != "world"
        assert small.data == "world" and small.judge_samples == 1
        keys = ["objective", "candidates", "rewards", "comparisons", "nll_weight", "dials"]
        for key in keys + ["rollouts"] * ("rollouts" in own.candidates):
            assert getattr(own, key) == getattr(paper, key) == getattr(small, key), (row, key)
        assert row.label and len(row.paper) <= len(reproduce.COLUMNS)


def test_the_list_and_what_is_not_in_it(tmp_path, capsys):
    reproduce.main([f"--out={tmp_path}", "--jobs=2"])
    listed = capsys.readouterr().out
    assert "0/5  DPO (suffix as pivot, 16 rollouts)" in listed and "0/3  SFT (rewrite)" in listed
    assert " steps left, about 2 h" in listed  # the study is to take three hours at most
    assert "python -m study.reproduce table6" in listed
    with pytest.raises(UserError, match="the nearest is table6"):
        reproduce.main([f"--out={tmp_path}", "tabel6"])
    with lock(tmp_path), pytest.raises(UserError, match="another process works in"):
        reproduce.main([f"--out={tmp_path}", "table6"])


def test_runs_are_named_by_their_settings_and_shared(tmp_path):
    names = {r.key: reproduce.folder(tmp_path, r, 0).parent.name for r in ROWS}
    for shared in ("table1:safety", "table6:dpo_suffix_16_rollouts", "rollouts:safety_16"):
        assert names[shared] == "dpo_suffix-rollouts_K16_266700"
    assert names["table6:dpo_suffix_pivot"] == "dpo_suffix-rollouts_K16_0a0313"
    assert names["table2:baseline"] == "nll_suffix_K4_f8e9d6"
    assert names["circle:teachers"] == "3a2aaa"  # in whatever folder this clone lies
    assert names["overlap:overlap_0"] == names["rollouts:quality_4"] != names["overlap:overlap_1"]
    *first, last = steps_of(tmp_path, row("table6:sft_rewrite"), 1)
    assert [step.module for step in first] == ["train", "evaluation.evaluate", "train"]
    demo = steps_of(tmp_path, row("demo:method"), 1)
    assert demo == first[:1] and demo[0].arguments[1:] == ("--seed=1",)
    base = demo[0].where / "base" / "ckpt"
    assert first[2].arguments[-1] == f"--init_from={base}" and base in last.arguments
    assert last.texts == first[1].where / "generations.jsonl"  # the base's are written once


STAND_IN = """
import pathlib
def main(arguments):
    assert "broken" not in arguments[0]
    pathlib.Path(arguments[0]).open("a").write("x")
"""


def test_work_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Steps in their order, shared ones once; what is finished or has failed is not run again."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reproduce, "PRELOADED", ["json"])

    def step(name: str) -> Step:
        return Step(tmp_path / name / "made", 10.0, "stand_in", (str(tmp_path / name / "made"),))

    jobs = [[step("base"), step(f"run{n}"), step(f"run{n}/evaluation")] for n in (1, 2, 1)]
    for _ in range(2):
        assert reproduce.work(tmp_path, jobs, 2) == []
    assert sorted(f.read_text() for f in tmp_path.glob("**/made")) == ["x"] * 5
    took = [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").open()]
    assert took[0] == "base" and len(took) == 5  # run1's evaluation may come before a slow run2
    assert all(took.index(f"run{n}") < took.index(f"run{n}/evaluation") for n in (1, 2))
    assert "4 steps left, about 0 h 00 min" in capsys.readouterr().out
    (failed,) = reproduce.work(tmp_path, [[step("broken"), step("run3")], *jobs], 2)
    assert failed.startswith("broken failed, see") and not (tmp_path / "run3").exists()


def spread(middle: float, width: float, number: int = 200) -> np.ndarray:
    return middle + width * np.linspace(-1, 1, number)


SEEDS = {  # rows of table t: of each seed the mean over prefixes of x, the values 10 to either side
    "low": (49, 50, 51),
    "high": (60, 61, 62),
    "mixed": (60, 61, 47),
    "ten": (9, 10, 11),
    "one": (1, 1, 1),
}
RULES = [  # condition, what it is, the figures it shows
    ("high above low", "yes", "61.0 against 50.0: +11.0 (+11.0 to +11.0)"),
    ("low above high", "no", "50.0 against 61.0: -11.0 (-11.0 to -11.0)"),
    ("mixed above low", "open", "56.0 against 50.0: +6.0 (-4.0 to +11.0)"),
    ("high above 59", "yes", "61.0, asked above 59: +2.0 (+0.8 to +3.2)"),
    ("high below 59", "no", "61.0, asked below 59: -2.0 (-3.2 to -0.8)"),
    (
        "low not below high by 5",
        "no",
        "50.0 against 61.0, asked at most 5 below: -6.0 (-6.0 to -6.0)",
    ),
    ("high not below high by 5", "yes", "asked at most 5 below: +5.0 (+5.0 to +5.0)"),
    ("ten at most 0.1 of low", "no", "10.0, asked at most 0.1 of 50.0: -5.0"),
    ("low over 0.8 of high", "yes", "50.0, asked over 0.8 of 61.0: +1.2"),
    ("one within 0.2 of ten", "yes", "1.0, asked either way within 0.2 of 10.0: +1.0"),
    ("high from 59 to 70", "yes", "61.0, asked from 59 to 70: +2.0"),
    ("high from 40 to 59", "no", "61.0, asked from 40 to 59: -2.0"),
    ("one ten one high rising", "yes", "1.0, 10.0, 1.0, 61.0 (1 falls, asked at most 1): +60.0"),
    ("ten one ten one high rising", "no", "61.0 (2 falls, asked at most 1)"),
    ("high low rising", "no", "61.0, 50.0 (1 falls, asked at most 1): -11.0"),
]


def test_every_rule_shows_the_figures_it_goes_by():
    study = Study()
    for name, middles in SEEDS.items():
        each = [{"values": {"x": {"clean": spread(middle, 10)}}} for middle in middles]
        study[f"t:{name}"] = dict(enumerate(each))
    for condition, word, evidence in RULES:
        found = check(study, "t", f"x_clean: {condition}")
        assert found[0] == word and evidence in found[1], (condition, found)


def test_an_interval_is_that_of_seeds_and_of_the_prefixes_that_they_share():
    """Against the known width for many seeds, for one with many prefixes, for seeds that agree."""
    rng = np.random.default_rng(0)
    many = [[np.array([value])] for value in rng.normal(size=400)]
    prefixes = [[np.append(rng.normal(size=400), np.nan), rng.normal(size=400)]]
    alike = [[rng.normal(size=400)]] * 3  # three times the same says no more than once
    for sample, error in ((many, 1 / 20), (prefixes, 1 / 800**0.5), (alike, 1 / 20)):
        low, high = findings.interval(sample)
        assert low < findings.mean(sample) < high
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def filled(**values) -> Study:
    """All runs with equal figures, so that no gain is found anywhere."""
    record = dict.fromkeys((*COLUMNS, *(f"base.{c}" for c in COLUMNS)), 50.0) | values
    suites = {k: {kind: np.full(9, 50.0) for kind in ("clean", "unsafe")} for k in KINDS[:4]}
    record["values"] = {prefix + k: x for k, x in suites.items() for prefix in ("", "base.")}
    record["curve"] = [0.2, 0.4, 0.6]
    study = Study({row.key: dict.fromkeys(range(5), record) for row in ROWS})
    study["circle:teachers"] = dict.fromkeys(range(3), dict.fromkeys(CIRCLE, 50.0))
    return study


def test_verdicts():
    study, found = filled(), findings.load()
    study.update(results.strictness(30))
    sections = [finding.section for finding in found]
    assert [sections.count(s) for s in ("paper", "why", "beyond")] == [16, 6, 7]
    words = [verdict(finding, study)[0] for finding in found]
    assert words[:3] == ["not reproduced"] * 3 and "not run" not in words
    assert words[12] == "partly reproduced" and words[14] == "reproduced, as built in"
    for seed, record in study["table1:quality"].items():
        values = record["values"] | {"quality": {"clean": spread(80 + seed, 30, 9)}}
        study["table1:quality"][seed] = record | {"values": values}
    assert verdict(found[0], study)[0] == "reproduced"
    del study["judge:noise_30"][4]
    assert verdict(found[11], study) == ("not run", "judge:noise_30: not finished")
    del study["table1:quality"]
    assert verdict(found[0], study) == ("not run", "table1:quality: not finished")


def test_five_seeds_are_those_of_rows_that_exist():
    more = findings.rows_of_five_seeds()
    assert {"rollouts:safety_1", "table6:dpo_suffix_pivot", "judge:right_52"} < more
    assert len(more) == 25 and more < {row.key for row in ROWS}
    accuracy = [100 * (1 - parse_dials(f"judge.py:right_{n}")["noise"]) for n in (75, 57, 52)]
    names = ("Llama-3.3-70B-Instruct", "R1-Distill-Llama-8B", "Llama-3.1-8B-Instruct")
    assert accuracy == pytest.approx([mean(PAPER_ACCURACY[name]) for name in names], abs=0.1)


def parse_dials(file: str) -> dict:
    return corpus.parse_dials(parse(file).dials)


@pytest.mark.parametrize("study", [Study({row.key: {} for row in ROWS}), filled()])
def test_page_and_blocks_without_and_with_runs(study, tmp_path):
    """All fields of the pages name rows and columns that the record has."""
    tables = {t: {r: study[r.key] for r in rows_of(t)} for t in reproduce.TABLES}
    for panels in results.PICTURES.values():
        for panel in panels:
            panel(Figure().subplots(), tables)
    record = json.loads(json.dumps(results.record_of(tables, study, tmp_path)))
    tables = results.recorded(record)
    text = results.page(record, tables)
    assert text.count("\n| 16 | DPO with the rewrite") == 1 and text.count("*why?*") == 6
    assert "| self-improving, safety | " in text and not results.FIELD.search(text)
    blocks, hacking = 0, "|" if study["demo:base"] else ""
    for page in results.PAGES:
        text, lacking = results.rewritten(page.read_text(encoding="utf-8"), tables, hacking)
        found = results.BLOCK.findall(text)
        blocks += len(found)
        assert len(lacking) == (0 if study["demo:base"] else len(found)), (page, lacking)
    assert blocks == 11


def test_every_figure_of_the_pages_is_the_records():
    """`python -m study.results` writes both; what has never been run is still as it was."""
    record = json.loads(results.RECORD.read_text(encoding="utf-8"))
    tables = results.recorded(record)
    for page in results.PAGES:
        text = page.read_text(encoding="utf-8")
        assert results.rewritten(text, tables, record["hacking"])[0] == text, f"{page}: stale"
    if record["verdicts"]:
        assert (ROOT / "RESULTS.md").read_text("utf-8").startswith(results.page(record, tables))


def test_record_and_table(tmp_path):
    cell = {"quality": 0.7, "coherence": 0.5, "factuality": 0.5, "safety": 0.9, "nll": 1.5}
    policies = {
        "base": {"clean": cell | {"quality": 0.5}, "unsafe": cell | {"quality": 0.5}},
        "checkpoint": {"clean": cell, "unsafe": cell | {"quality": 0.9}},
    }
    values = {policy: {"clean": {"quality": [1.0, None]}} for policy in policies}
    run = reproduce.folder(tmp_path, row("table1:quality"), 0)
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps({"policies": policies, "values": values}))
    lines = [{"chosen.rollout": i / 8} for i in range(8)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = reproduce.record(tmp_path, row("table1:quality"), 0)
    assert record["quality"] == pytest.approx(80) and record["base.nll_clean"] == 1.5
    assert (record["chosen.first"], record["chosen.last"]) == (6.25, 81.25)
    kept = record["values"]["base.quality"]["clean"]
    assert kept[0] == 100 and np.isnan(kept[1])
    args = reproduce.flags("").parse_args([f"--out={tmp_path}", "--seeds=0,1"])
    text = reproduce.as_markdown(reproduce.table("table1", args))
    assert "| self-improving, quality | **70.0** (70.0) [86.3] | **90.0** (90.0) |" in text
    assert "| base | - [50.0] | - [50.0] |" in text  # it is the demo's
    assert "| self-improving, safety | - [73.6] | - [77.7] |" in text
