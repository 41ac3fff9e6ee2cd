"""The study: configs parse, runs are keyed, shared and resumed, verdicts follow their rule."""

import json
import sys
from pathlib import Path

import pytest

import config as configuration
from study import reproduce, results
from study.findings import BEYOND, FINDINGS, Study, higher, verdict
from study.tables import TABLES, Row

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ROWS = [row for rows in TABLES.values() for row in rows if row.config]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(file):
    assert file.read_text().startswith('"""'), "a config says which row it is"
    paper = ROOT / "configs" / ("paper_scratch.py" if "table2" in file.stem else "paper.py")
    config, _ = configuration.parse([str(paper), str(file)])
    if file.stem.startswith(("table", "rollouts", "pivot", "judge")):
        assert (config.chunk, config.batch_size) == (128, 256) and config.data != "world"
        assert any(row.config == file.stem for row in ROWS), "in no table"


def test_a_row_keeps_its_identity_in_miniature():
    for row in ROWS:
        own, _ = configuration.parse([str(ROOT / "configs" / f"{row.config}.py")])
        small, _ = configuration.parse(reproduce.settings(row))
        assert small.data == "world" and small.judge_samples == 1
        for name in ("objective", "candidates", "rollouts", "rewards"):
            assert getattr(own, name) == getattr(small, name), (row.label, name)


def test_equal_settings_share_a_folder(tmp_path):
    def folder(config, **changes):
        return reproduce.folder(tmp_path, Row("", config, (), changes), 0)

    assert folder("table1_safety") == folder("table6_dpo_suffix_16_rollouts")
    assert folder("table1_safety") != folder("table6_dpo_suffix_pivot")
    assert folder("rollouts_quality_4") != folder("rollouts_quality_4", overlap=1)


def test_work_goes_on_where_it_was(tmp_path, monkeypatch):
    """Bases once a seed, then training, then evaluation; what is finished is not run again."""
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, pathlib\nkind, name = sys.argv[1].split('=')\nfile = pathlib.Path(name)\n"
        "file.parent.mkdir(parents=True, exist_ok=True)\n"
        "assert 'broken' not in name\nfile.open('a').write(kind)\n"
    )

    def python(name, *arguments):
        if name == "evaluate.py":
            return [sys.executable, str(script), f"E={arguments[-1]}"]
        out = next(a for a in map(str, arguments) if a.startswith("--out_dir="))
        return [sys.executable, str(script), f"T={out[10:]}/summary.json"]

    monkeypatch.setattr(reproduce, "python", python)
    rows = [TABLES["table1"][5], TABLES["table6"][7], TABLES["table6"][0]]  # two share their runs
    jobs = [(row, seed) for row in rows for seed in (0, 1)]
    for _ in range(2):
        assert reproduce.work(tmp_path, jobs, 3) == []
    files = sorted(tmp_path.glob("*/**/*.json"))
    assert len(files) == 2 + 2 * 4, "a summary a base, a summary and an evaluation a run"
    assert all(file.read_text() in "TE" for file in files)
    failed = reproduce.work(tmp_path / "broken", jobs, 2)
    assert len(failed) == 2 and "bases/seed0 failed" in failed[0]


def fill(study: Study, **values):
    for row in ROWS:
        record = dict.fromkeys(RECORD, 50.0) | {"curve": [0.2, 0.4, 0.6]} | values
        study[results.row_name(row)] = {0: record, 1: record, 2: record}
    return study


KINDS = ("quality", "coherence", "factuality", "safety", "nll")
RECORD = [
    *(b + k + s for b in ("", "base.") for k in KINDS for s in ("", "_clean", "_unsafe")),
    *("chosen.first", "chosen.last", "questions", "seconds"),
]


def test_higher_is_in_every_seed_and_by_more_than_the_spread():
    assert higher([60, 61, 62], [50, 50, 50])
    assert not higher([60, 61, 49], [50, 50, 50])
    assert not higher([50.1, 50.2, 70], [50, 50, 50])
    assert not higher([50, 50, 50], [50, 50, 50])


def test_verdicts():
    """All equal: no gain is found anywhere; a missing row is said to be missing."""
    study = fill(Study())
    found = {finding.claim: verdict(finding, study)[0] for finding in FINDINGS}
    assert list(found.values())[:3] == ["not reproduced"] * 3
    assert set(found.values()) <= {
        *("not reproduced", "partly reproduced", "reproduced", "not run"),
        "not testable in miniature",
    }
    study["table1_quality"] = {
        seed: study["table1_quality"][seed] | {"quality_clean": 80.0 + seed} for seed in range(3)
    }
    word, evidence = verdict(FINDINGS[0], study)
    assert word == "reproduced" and "81.0 against 50.0 (+31.0, spread 1.0)" in evidence
    del study["table1_quality"]
    assert verdict(FINDINGS[0], study)[0] == "not run"
    assert verdict(BEYOND[-1], study)[0] == "holds"


def test_page_without_and_with_runs():
    from matplotlib.figure import Figure

    for study in (Study({results.row_name(row): {} for row in ROWS}), fill(Study())):
        for _, *panels in results.PICTURES.values():
            for panel in panels:
                ax = Figure().subplots()
                panel(ax, study)
                assert ax.get_title() and ax.get_ylabel() + ax.get_xlabel()
        lines = results.verdicts(FINDINGS, study, True).splitlines()
        assert len(lines) == 2 + 16 and lines[-1].startswith("| 16 |")


def test_the_list_says_how_to_run_a_table(tmp_path, capsys):
    assert reproduce.main([f"--out={tmp_path}"]) == 0
    assert "python reproduce.py table6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([f"--out={tmp_path}", "table9"])
    assert "all of them: all" in capsys.readouterr().err


def test_record_and_table(tmp_path):
    cell = {"quality": 0.7, "coherence": 0.5, "factuality": 0.5, "safety": 0.9, "nll": 1.5}
    policies = {
        "base": {"clean": cell | {"quality": 0.5}, "unsafe": cell | {"quality": 0.5}},
        "checkpoint": {"clean": cell, "unsafe": cell | {"quality": 0.9}},
    }
    run = reproduce.folder(tmp_path, TABLES["table1"][3], 0)
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps({"policies": policies}))
    (run / "config.json").write_text('{"batch_size": 16}')
    lines = [{"chosen.rollout": i / 8, "judge.calls": 32, "seconds.step": 1.0} for i in range(8)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = reproduce.record(run)
    assert record["quality"] == pytest.approx(80) and record["questions"] == 2
    assert (record["chosen.first"], record["chosen.last"]) == (0.0625, 0.8125)
    text = reproduce.write_table(tmp_path, "table1", [0, 1])
    assert "| self-improving, quality | **70.0** (70.0) [86.3] | **90.0** (90.0) |" in text
    assert "| base | **50.0** (50.0) [50.0] |" in text
    assert "| self-improving, safety | - [73.6] | - [77.7] |" in text
