"""The study: rows are configurations, runs are keyed, shared and resumed, verdicts follow rules."""

import json
import re
import sys
from functools import partial

import pytest
from matplotlib.figure import Figure

import config as configuration
from study import findings, reproduce, results
from study.findings import Study, check, verdict
from study.reproduce import Row, rows_of
from support.command import ROOT, UserError

ROWS = [row for name in reproduce.TABLES for row in rows_of(name)]
KINDS = ("quality", "coherence", "factuality", "safety", "nll")
RECORD = [
    *(b + k + s for b in ("", "base.") for k in KINDS for s in ("", "_clean", "_unsafe")),
    *("chosen.first", "chosen.last"),
]


def row(name: str) -> Row:
    table, _, name = name.partition(":")
    return next(row for row in rows_of(table) if row.name == name)


def parse(*arguments: str):
    return configuration.parse([str(ROOT / "configs" / file) for file in arguments])[0]


def test_a_row_is_the_same_at_every_scale():
    """Of the paper's scale and ours, alone and with either."""
    for row in ROWS:
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
    reproduce.main([f"--out={tmp_path}"])
    listed = capsys.readouterr().out
    assert "0/3  DPO (suffix as pivot, 16 rollouts)" in listed
    assert "python -m study.reproduce table6" in listed
    with pytest.raises(UserError, match="the nearest is table6"):
        reproduce.main([f"--out={tmp_path}", "tabel6"])


def test_runs_of_before_are_found_and_shared(tmp_path):
    names = {r.key: reproduce.folder(tmp_path, r, 0).parent.name for r in ROWS}
    for shared in ("table1:safety", "table6:dpo_suffix_16_rollouts", "rollouts:safety_16"):
        assert names[shared] == "dpo_suffix-rollouts_K16_266700"
    assert names["table6:dpo_suffix_pivot"] == "dpo_suffix-rollouts_K16_0a0313"
    assert names["table2:baseline"] == "nll_suffix_K4_f8e9d6"
    assert names["overlap:overlap_0"] == names["rollouts:quality_4"] != names["overlap:overlap_1"]


def test_work_goes_on_where_it_was(tmp_path, monkeypatch):
    """Bases once a seed, then training, then evaluation; what is finished is not run again."""
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, pathlib\nkind, name = sys.argv[1].split('=')\nfile = pathlib.Path(name)\n"
        "file.parent.mkdir(parents=True, exist_ok=True)\n"
        "assert 'broken' not in name\nfile.open('a').write(kind)\n"
    )

    def python(module, *arguments):
        if module == "evaluation.evaluate":
            return [sys.executable, str(script), f"E={arguments[-1]}"]
        out = next(a for a in map(str, arguments) if a.startswith("--out_dir="))
        return [sys.executable, str(script), f"T={out[10:]}/summary.json"]

    monkeypatch.setattr(reproduce, "python", python)
    rows = ["table1:safety", "table6:dpo_suffix_16_rollouts", "table6:sft_rewrite"]  # two share

    def jobs(out):
        each = [(row(name), seed) for name in rows for seed in (0, 1)]
        return [partial(reproduce.next_step, out, *job) for job in each]

    for _ in range(2):
        assert reproduce.work(tmp_path, jobs(tmp_path), 3) == []
    files = sorted(tmp_path.glob("*/**/*.json"))
    assert len(files) == 2 + 2 * 4, "a summary a base, a summary and an evaluation a run"
    assert all(file.read_text() in "TE" for file in files)
    failed = reproduce.work(tmp_path / "broken", jobs(tmp_path / "broken"), 2)
    told = [line.partition(",")[0] for line in failed]
    assert told == [f"bases/2d0669/seed{s} failed" for s in (0, 1)]


SEEDS = {  # rows of table t with a column x
    "low": (49, 50, 51),
    "high": (60, 61, 62),
    "mixed": (60, 61, 51),
    "wild": (50.1, 51.2, 70),
    "ten": (9, 10, 11),
    "one": (1, 1, 1),
}
RULES = [  # condition, whether it holds, the figures and limits it shows
    ("high above low", True, "61.0 against 50.0 (+11.0, spread 0.0)"),
    ("mixed above low", False, "57.3 against 50.0 (+7.3, least +0.0, spread 6.4)"),
    ("wild above low", False, "57.1 against 50.0 (+7.1, spread 10.3)"),
    ("low not below high", False, "50.0 against 61.0 (-11.0, spread 0.0)"),
    ("mixed not below high", True, "57.3 against 61.0 (-3.7, spread 6.4)"),
    ("ten at most 0.1 of low", False, "+10.0 (asked: at most 0.1 of +50.0)"),
    ("low over 0.8 of high", True, "82 % (asked: over 80 %)"),
    ("one within 0.2 of ten", True, "+1.0 (asked: within 0.2 of +10.0, either way)"),
    ("mixed each below 61", False, "57.3 (60.0, 61.0, 51.0; asked: below 61 in each seed)"),
    ("high each above 60", False, "61.0 (60.0, 61.0, 62.0; asked: above 60 in each seed)"),
    ("high each from 60 to 62", True, "61.0 (60.0, 61.0, 62.0; asked: from 60 to 62 in each seed)"),
    ("one ten one high rising", True, "1.0, 10.0, 1.0, 61.0 (falls: 1, asked: at most 1)"),
    ("ten one ten one high rising", False, "61.0 (falls: 2, asked: at most 1)"),
    ("high low rising", False, "61.0, 50.0 (falls: 1, asked: at most 1; the last is not above"),
]


def test_every_rule_shows_the_figures_it_goes_by():
    seeds = {f"t:{name}": enumerate(values) for name, values in SEEDS.items()}
    study = Study({row: {seed: {"x": x} for seed, x in runs} for row, runs in seeds.items()})
    for condition, holds, evidence in RULES:
        found = check(study, "t", f"x: {condition}")
        assert found[0] == holds and evidence in found[1], condition


def filled(**values) -> Study:
    """All runs with equal figures, so that no gain is found anywhere."""
    record = dict.fromkeys(RECORD, 50.0) | {"curve": [0.2, 0.4, 0.6]} | values
    study = Study({row.key: dict.fromkeys(range(3), record) for row in ROWS})
    names = ("judge.quality.cold", "judge.quality.grpo", "rewriter.copied.grpo")
    circle = dict.fromkeys((*names, "rewriter.safe.grpo"), 50.0)
    study["circle:teachers"] = dict.fromkeys(range(3), circle)
    return study


def test_verdicts():
    study, found = filled(), findings.load()
    assert [finding.section for finding in found] == ["paper"] * 16 + ["beyond"] * 5
    words = [verdict(finding, study)[0] for finding in found]
    assert words[:3] == ["not reproduced"] * 3 and words[-1] == "holds"
    assert words[12] == "partly reproduced" and words[14] == "not testable in miniature"
    assert "not run" not in words
    for seed, record in study["table1:quality"].items():
        study["table1:quality"][seed] = record | {"quality_clean": 80.0 + seed}
    assert verdict(found[0], study)[0] == "reproduced"
    del study["table1:quality"]
    assert verdict(found[0], study) == ("not run", "table1:quality: not finished")


@pytest.mark.parametrize("study", [Study({row.key: {} for row in ROWS}), filled()])
def test_page_without_and_with_runs(study):
    rows = [*ROWS, Row("table1", "", "base", reproduce.BASE["table1"])]
    tables = {t: {r: study.get(r.key, {}) for r in rows if r.table == t} for t in reproduce.TABLES}
    for panels in results.PICTURES.values():
        for panel in panels:
            panel(Figure().subplots(), tables)
    text = results.page(tables, study)
    assert text.count("\n| 16 | DPO with the rewrite") == 1
    assert "| self-improving, safety | " in text and not re.search(r"\{\w+\}", text)


def test_record_and_table(tmp_path):
    cell = {"quality": 0.7, "coherence": 0.5, "factuality": 0.5, "safety": 0.9, "nll": 1.5}
    policies = {
        "base": {"clean": cell | {"quality": 0.5}, "unsafe": cell | {"quality": 0.5}},
        "checkpoint": {"clean": cell, "unsafe": cell | {"quality": 0.9}},
    }
    run = reproduce.folder(tmp_path, row("table1:quality"), 0)
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps({"policies": policies}))
    lines = [{"chosen.rollout": i / 8} for i in range(8)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = reproduce.record(run)
    assert set(RECORD) | {"curve"} == set(record)
    assert record["quality"] == pytest.approx(80)
    assert (record["chosen.first"], record["chosen.last"]) == (6.25, 81.25)
    text = reproduce.as_markdown(reproduce.table(tmp_path, "table1", [0, 1]))
    assert "| self-improving, quality | **70.0** (70.0) [86.3] | **90.0** (90.0) |" in text
    assert "| base | **50.0** (50.0) [50.0] |" in text
    assert "| self-improving, safety | - [73.6] | - [77.7] |" in text
