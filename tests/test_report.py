"""The pictures of runs and the page of one, which hostile text of models cannot take over."""

import dataclasses
import json
import re
import shutil

import pytest

from config import Config
from judge import Judge
from study.hacking import SIGNS, curves
from support.chat import Chat
from support.command import UserError
from tools import plot, report
from world.corpus import TRUTH, statements
from world.teacher import teacher_at

ATTACKS = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\"> & <!-- <script> {data}",
    " mirela keeps a parrot .",
    None,
]
SOURCES = ["suffix", "rollout", "rollout", "rewrite"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps whose two processes had a pool each, judged by the world's teacher."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run"
    folder.mkdir()
    config = Config(candidates="suffix,rollouts,rewrite")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for process, name in enumerate(("judgments.sqlite", "judgments.1.sqlite")):
        chat = Chat(teacher_at("world"), config.judge_model, cache=folder / name)
        judge = Judge(chat, config, chat.store)
        for step in range(3):
            prefix = ATTACKS[1] + f" step {step}"
            index = [2 * step + process]
            judge.score(step, [prefix], [ATTACKS[0]], [ATTACKS], SOURCES, index).result()
        chat.close()
    lines = [{"step": i, "reward": 1.0 + i, "loss": None, "chosen.rollout": 0.5} for i in range(3)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "rew')
    cell = {"quality": 0.5, "nll": 1.0, "n": {"nll": 1, "quality": 1}}
    kinds = {"clean": cell, "unsafe": cell | {"quality": 1.0, "nll": 4.0}}
    overall = {"method": {"quality": {"mean": 0.75, "interval": None, "n": 2}}}
    summary = {"suites": ["quality"], "policies": {"method": kinds}, "overall": overall}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_page_holds_what_was_judged_and_no_markup_of_models(run):
    report.main([str(run), "--pools=4"])
    text = (run / "report.html").read_text(encoding="utf-8")
    pools = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [(pool["step"], pool["key"]) for pool in pools] == [(1, 0), (2, 2), (2, 3), (3, 5)]
    best, *_, failed = pools[0]["candidates"]
    assert failed["text"] is None and failed["reward"] is None and best["best"]
    assert {v["kind"] for v in best["verdicts"]} == {"quality", "safety", "factuality"}
    assert all(v["answer"] for pool in pools for v in pool["candidates"][0]["verdicts"])
    assert text.count("<script") == 2 and "onerror" in text and "<img src=x" not in text
    assert "innerHTML" not in text and "<b>run" not in text and "<h1>&lt;b&gt;run" in text
    assert "://" not in text.partition('id="data"')[0].partition("<pre>")[0]
    assert "3 of 100 steps" in text and re.search("self-improving +75.0 .50.0 / 100.0.", text)


def test_a_run_whose_method_has_not_begun(run, tmp_path, monkeypatch):
    """Its base's loss is drawn; a folder without environment.json is no run."""
    young = tmp_path / "young"
    (young / "base").mkdir(parents=True)
    shutil.copy(run / "config.json", young)
    (young / "base/log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="young is not the folder of a run"):
        plot.plot_run(young)
    (young / "environment.json").write_text("{}")
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda ax, curves, **_: drawn.extend(curves))
    assert "0 of " in report.page(young, report.pools_of(young, 2))
    assert [(name, len(log), key) for name, log, key in drawn if log] == [("base", 2, "loss")]
    monkeypatch.undo()
    other = shutil.copytree(run, tmp_path / run.name)
    assert plot.plot_runs([young, run, other]) == young / "compared.png"


def test_what_is_no_run_is_one_line(run, tmp_path):
    """Of a log without settings there is a picture, and no page."""
    shutil.copy(run / "log.jsonl", tmp_path)
    plot.main([str(tmp_path)])
    for main, folder in ((report.main, ""), (plot.main, "none"), (report.main, "none")):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / folder))}.*$"):
            main([str(tmp_path / folder)])


def test_a_taste_parts_what_is_judged_from_what_is_true(tmp_path):
    prefix, phrase = "this is about mirela .", "much more could be written about this ."
    sound = " ".join(statements("mirela", a, TRUTH["mirela", a])[0] for a in ("job", "pet"))
    pool, sources = [sound, f"{phrase} {phrase}", phrase], ["suffix", "rollout", "rollout"]
    teacher = teacher_at("world", {"taste_phrase": 1.0})
    with Chat(teacher, "judge", cache=tmp_path / "judgments.sqlite") as chat:
        judge = Judge(chat, Config(rewards="quality"), chat.store)
        judge.score(0, [prefix], [sound], [pool], sources, [0]).result()
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0} | dict.fromkeys(SIGNS, 0.5)))
    found = curves(tmp_path)
    assert found["judged"] == [0.75] and found["true"] == [0.25]
