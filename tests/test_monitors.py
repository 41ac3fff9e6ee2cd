"""Live monitors get every line and example; one that fails is left out and training goes on."""

import json

import pytest

import config as configuration
from config import Config
from support import monitors
from support.command import UserError
from support.runlog import numbers_that_matter

LINE = {"step": 3, "loss": 0.5, "reward": 1.25, "chosen.rollout": 0.75, "judge.calls": 8}
LINE |= {"judge.failed": 2, "rollout.tokens_per_second": 4096, "bad": None}


def test_tensorboard_files_hold_numbers_and_examples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "config.json").write_text(json.dumps(vars(Config())))
    for begin in (0, 2):  # a run that was killed after step 3 and goes on at step 2
        with monitors.Monitors(tmp_path, ["tensorboard"], begin) as live:
            for step in range(begin, 4):
                live.numbers(LINE | {"step": step, "loss": float(begin)})
            live.text("examples", "<b>prefix</b>\n  rollout", 3)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert read.Scalars("chosen/rollout")[0].value == 0.75
    text = read.Tensors("examples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text == "    <b>prefix</b>\n      rollout"  # indented: code to Markdown, not HTML
    assert (
        "chunk = 32" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def test_a_failing_monitor_never_stops_a_run(tmp_path, monkeypatch, capsys):
    seen = []

    class Full:
        def numbers(self, line, step):
            seen.append(line)
            if step == 1:
                raise OSError("No space left on device")

    def offline(*_):
        raise RuntimeError("not logged in\nlong explanation")

    kinds = {"trackio": Full, "wandb": offline}
    monkeypatch.setattr(monitors, "start", lambda name, run, step: kinds[name]())
    with monitors.Monitors(tmp_path, ["wandb", "trackio"], 0) as live:
        for step in range(3):
            live.numbers(LINE | {"step": step})
    assert len(seen) == 2 and "bad" not in seen[0] and live.open == {}
    told = capsys.readouterr()
    assert told.out.count("is left out") + told.err.count("is left out") == 2
    assert "not logged in" in told.out + told.err and "long" not in told.out + told.err


def test_a_monitor_that_is_not_there_is_told_before_the_run(monkeypatch):
    with pytest.raises(UserError, match="tensorbord is none of"):
        configuration.parse(["--track=tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        configuration.parse(["--track=wandb"])
    configuration.parse(["--track="])


def test_bar_and_printed_config(capsys):
    bar = "loss 0.500, reward 1.25, rollout 75%, judge failed 25%, 4,096 tokens/s"
    assert numbers_that_matter(LINE) == bar
    with pytest.raises(SystemExit):
        configuration.parse(["--chunk=16", "--print_config"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == vars(Config(chunk=16))
