"""Live monitors get every line and example; one that fails is left out and training goes on."""

import json
from unittest.mock import Mock

import pytest

import config as configuration
from config import Config
from support import monitors
from support.command import UserError


def test_tensorboard_files_hold_numbers_and_examples(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    (tmp_path / "config.json").write_text(json.dumps(vars(Config())))
    for begin in (0, 2):  # a run that was killed after step 3 and goes on at step 2
        # files are read in the order of their names, seconds first: two begin in different ones
        monkeypatch.setattr(event_file_writer, "time", Mock(time=lambda at=begin: 10**9 + at))
        live = monitors.Monitors(tmp_path, ["tensorboard"], begin)
        for step in range(begin, 4):
            live.tell("numbers", {"loss": float(begin), "chosen.rollout": 0.75}, step)
        live.tell("text", "examples", "<b>prefix</b>\n  rollout", 3)
        live.tell("close")
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert read.Scalars("chosen/rollout")[0].value == 0.75
    example, config = (
        read.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("examples", "config")
    )
    assert example == "    <b>prefix</b>\n      rollout"  # indented: code to Markdown, not HTML
    assert '"chunk": 32' in config


def test_a_failing_monitor_never_stops_a_run(tmp_path, monkeypatch, capsys):
    full = Mock()
    full.numbers.side_effect = OSError("No space left on device\nlong explanation")
    kinds = {"full": lambda *_: full, "offline": lambda *_: {}["no login"]}
    monkeypatch.setattr(monitors, "KINDS", kinds)
    live = monitors.Monitors(tmp_path, ["full", "offline"], 0)
    live.tell("numbers", {"loss": 1.0}, 0)
    live.tell("numbers", {"loss": 1.0}, 1)
    told = "".join(capsys.readouterr())
    assert told.count("is left out") == 2 and live.open == {}
    assert "No space left" in told and "no login" in told and "long" not in told


def test_a_monitor_that_is_not_there_is_told_before_the_run(monkeypatch):
    with pytest.raises(UserError, match="tensorbord is none of"):
        configuration.parse(["--track=tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        configuration.parse(["--track=wandb"])
    configuration.parse(["--track="])
