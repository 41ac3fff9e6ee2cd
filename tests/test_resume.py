"""Runs that are killed, interrupted or out of disk, and what the next start makes of them.

The default kills five times. `NANOSIP_FULL=1 pytest tests/test_resume.py -s -k killed` kills 52
times, over one and two processes and overlap 0 and 1.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from faulty_server import faulty_server, world_teacher
from nursery import Run, assert_same_run, log_of, table

import train
from config import Config, phases
from data import open_stream
from judge import first_wins
from model import Llama, ModelConfig, load_model, preset
from support import checkpoint, command
from support.command import UserError
from support.files import write_text
from support.runlog import WINDOW, Collapse
from support.tokenizer import from_words, load_tokenizer
from world.corpus import WorldSource

FULL = bool(os.environ.get("NANOSIP_FULL"))
KINDS = [(1, 0, 13), (1, 1, 13), (2, 0, 13), (2, 1, 13)] if FULL else [(1, 0, 2), (2, 1, 3)]
TINY = ["--base_steps=10", "--base_batch_size=8", "--max_steps=6", "--batch_size=4", "--rollouts=2"]
TINY += ["--chunk=8", "--max_seq=24", "--eval_prefixes=4", "--save_every=2"]
SHORT = ["--base_steps=1", "--baseline=False", "--eval_prefixes=0"]


class Runs:
    """Starts runs of one kind with a teacher of their own, and keeps an uninterrupted one."""

    def __init__(self, server, folder: Path):
        self.server, self.folder, self.whole = server, folder, {}

    def start(self, out, *flags, processes=1, overlap=0, **how):
        url = [f"--judge_url={self.server.url}", f"--rewrite_url={self.server.url}"]
        argv = [f"--out_dir={out}", *TINY, *url, f"--overlap={overlap}", *flags]
        return Run(argv, processes, **how)

    def reference(self, processes=1, overlap=0) -> tuple[Path, float]:
        """(folder, seconds) of the uninterrupted run."""
        kind = (processes, overlap)
        if kind not in self.whole:
            out, began = self.folder / f"whole_{processes}_{overlap}", time.monotonic()
            run = self.start(out, processes=processes, overlap=overlap)
            assert run.wait() == 0, run.stdout + run.stderr
            self.whole[kind] = out, time.monotonic() - began
        return self.whole[kind]

    def kill_and_go_on(self, out, rng, kills: int, seconds: float, **kind) -> int:
        """Start the run and kill it at a random moment of as many seconds, again and again until it
        ends or has been killed `kills` times; then let it end. -> kills"""
        killed, stored, seen = 0, set(), Counter()
        while not (out / "summary.json").exists():
            run, longest = self.start(out, **kind), seconds if killed < kills else math.inf
            until = time.monotonic() + rng.random() * longest
            while run.alive() and time.monotonic() < until:
                time.sleep(0.01)
            run.signal(signal.SIGKILL)
            code = run.wait()
            assert code in (0, -signal.SIGKILL), run.stdout + run.stderr
            killed += code != 0
            # Keys of the answers are hashes of the requests' bodies, by which the server counts.
            again = [key for key in stored if self.server.seen[key] > seen[key]]
            assert again == [], f"{len(again)} answered questions were asked again"
            stored = {key.hex() for (key,) in table(out, "SELECT key FROM answers")}
            seen = self.server.seen.copy()
        return killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with faulty_server(answer=world_teacher) as server:
        yield Runs(server, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("processes", "overlap", "kills"), KINDS)
def test_killed_runs_end_as_if_they_had_not_been(runs, processes, overlap, kills, tmp_path):
    kind = dict(processes=processes, overlap=overlap)
    whole, seconds = runs.reference(**kind)
    rng, killed, number = random.Random(f"{processes} {overlap}"), 0, 0
    while killed < kills:
        out, number = tmp_path / f"killed{number}", number + 1
        killed += runs.kill_and_go_on(out, rng, kills - killed, 0.5 * seconds, **kind)
        assert_same_run(whole, out)
    print(f"\n{kind}: {number} runs, {killed} kills", flush=True)


def test_a_signal_to_one_process_saves_and_stops_all(runs, tmp_path):
    kind, out = dict(processes=2, overlap=1), tmp_path / "stopped"
    whole, _ = runs.reference(**kind)
    run = runs.start(out, **kind)
    run.until_it_logs(out)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    began = time.monotonic()
    assert run.wait() == 130 and time.monotonic() - began < 20, run.stdout + run.stderr
    assert run.stderr.count("the same command goes on with it") == 1
    run = runs.start(out, **kind)
    assert run.wait() == 0 and "going on with the unfinished run" in run.stdout
    assert_same_run(whole, out)


def test_a_full_disk_ends_in_one_line_and_harms_no_checkpoint(runs, tmp_path):
    """The last checkpoint is damaged, the disk is full when it is written again, then it is not."""
    whole, out = runs.reference()[0], tmp_path / "full"
    shutil.copytree(whole, out, symlinks=True)
    (out / "summary.json").unlink()
    settings = (out / "config.json").read_text()
    (out / "config.json").write_text(settings.replace(str(whole), str(out)))
    damaged = out / "checkpoints" / "step_000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in (out / "checkpoints/step_000004").iterdir()}
    for limit in (1 << 20, 3 << 20):  # in the middle of the weights, of the optimiser's state
        run = runs.start(out, file_limit=limit)
        assert run.wait() == 1 and "Traceback" not in run.stderr
        told = f"checkpoint {damaged.parent} is damaged" in run.stdout
        assert told == (limit == 1 << 20)  # it is set aside then
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: cannot write the checkpoint {out}/checkpoints/step_000006 ")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list((out / "checkpoints").glob(".writing*"))
    assert runs.start(out).wait() == 0
    assert_same_run(whole, out)


def test_a_folder_that_cannot_be_written_is_one_line(runs):
    run = runs.start("/proc/run")  # not even root can write there
    assert run.wait() == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: /proc/run: ")


@pytest.mark.parametrize(
    ("status", "message"),
    [("401", "Incorrect API key"), ("400", "maximum context length is 4096 tokens")],
)
def test_a_refusal_ends_a_run_at_once_with_the_servers_words(runs, status, message, tmp_path):
    """Here after 100 answers; the steps before are saved."""

    def answer(request):
        if sum(server.counts.values()) > 100:
            server.share = 1.0
        return world_teacher(request)

    with faulty_server([status], 0.0, answer=answer, message=message) as server:
        url = [f"--judge_url={server.url}", f"--rewrite_url={server.url}"]
        run = runs.start(tmp_path / "out", *SHORT, "--save_every=9", *url)
        assert run.wait() == 1 and "Traceback" not in run.stderr
    done = len(log_of(tmp_path / "out"))
    assert done > 0 and (tmp_path / "out" / "ckpt").resolve().name == f"step_{done:06d}"
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert f"{server.url}/chat/completions answered {status}: " in line


def test_without_verdicts_or_rewrites_nothing_is_learned_and_the_run_says_so(runs, tmp_path):
    """A failure is no reward of zero, and a step without a row has no loss."""
    with faulty_server(answer=lambda request: "I'm sorry, but I can't help with that.") as server:
        flags = [f"--rewrite_url={server.url}", *SHORT, "--max_steps=1"]
        deaf = [f"--judge_url={server.url}", "--judge_retries=0"]
        assert runs.start(tmp_path / "judge", *flags, *deaf).wait() == 0
        run = runs.start(tmp_path / "rewriter", *flags, "--candidates=suffix,rewrite")
        assert run.wait() == 0, run.stderr
    line = json.loads((tmp_path / "judge" / "log.jsonl").read_text())
    assert line["skipped"] == line["rewrite.failed"] == 4
    assert line["reward"] is line["reward.quality"] is line["loss"] is None
    assert line["judge.absent"] == line["judge.failed"] == line["judge.calls"] > 0
    assert "method: none of 1 steps learned from anything" in run.stdout
    assert "rewrites failed 4" in run.stdout and "loss -" in run.stdout


def test_updates_that_are_not_finite_are_skipped_kept_and_end_the_run(runs, tmp_path):
    out = tmp_path / "out"
    run = runs.start(out, "--base_learning_rate=1e30", processes=2)
    assert run.wait() == 1 and "Traceback" not in run.stderr
    assert "error: 5 updates in a row were not finite" in run.stderr
    assert run.stdout.count("NOT FINITE: update skipped") == 5
    lines = log_of(out / "base")
    assert [line["not_finite"] for line in lines] == [0, 1, 1, 1, 1, 1]
    assert all(line["loss"] is None or line["grad_norm"] is None for line in lines[1:])
    kept = sorted((out / "base" / "bad_batches").iterdir())
    assert len(kept) == 10  # of both processes
    saved = torch.load(kept[0], weights_only=True)
    assert saved["step"] == 1 and len(saved["pool"]["batch"]["prefix"]) == 4


def test_collapse_is_announced_against_the_runs_own_start():
    healthy = {"rollout.nll": 1.0, "rollout.length": 30.0, "rollout.repeated": 0.1}
    healthy["rollout.alike"] = 0.2
    log = [healthy] * WINDOW
    changed = [("rollout.nll", 0.1), ("rollout.length", 5.0), ("rollout.length", 90.0)]
    changed += [("rollout.repeated", 0.9), ("rollout.alike", 0.9)]
    assert Collapse(log).see({"loss": 1.0}) == []
    for name, value in changed:
        watch = Collapse(log)  # as a resumed run would
        assert watch.see(healthy | {name: 0.5 * healthy[name]}) == []
        words = [watch.see(healthy | {name: value}) for _ in range(2 * WINDOW)]
        assert words[0] == [] and len(words[-1]) == 1
        assert words[-1][0].startswith(f"COLLAPSE: {name} {value:.2f}, ")


# --- support/checkpoint.py alone


@pytest.fixture(scope="module")
def write():
    tokenizer = from_words(["word"])
    policy = Llama(ModelConfig(tokenizer.vocab_size, 1, 1, 1, 8, 8, 8)).initialise(0)
    return lambda folder: train.write_folder(policy, tokenizer, folder)


def saved_step(run):
    _, state = checkpoint.load(run, load_model)
    return state and state["step"]


def dies_before_change(fatal: int, act) -> bool:
    """Whether act(), in a process of its own, is killed before its change number `fatal` to the
    disk, or gets through."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    left = iter(range(fatal - 1))

    def die(event, _):
        changes = "open", "os.rename", "os.symlink", "os.remove", "os.rmdir"
        if event in changes and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    act()
    os._exit(0)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_that_dies_anywhere_leaves_one_checkpoint_or_the_other(keep, write, tmp_path):
    """Killed before its 1st, 2nd, ... change to the disk, until it gets through."""
    dead, fatal = True, 0
    while dead:
        fatal += 1
        run = tmp_path / str(fatal)
        checkpoint.save(run, 2, write, {"step": 2}, keep)
        again = partial(checkpoint.save, run, 4, write, {"step": 4}, keep)
        dead = dies_before_change(fatal, again)
        assert saved_step(run) in ((2, 4) if dead else (4,))
        checkpoint.save(run, 6, write, {"step": 6}, keep)
        assert saved_step(run) == 6 and (run / "ckpt" / "config.json").exists()
    assert fatal > 10


def test_a_text_file_is_the_old_one_or_the_new(tmp_path):
    path, old, new = tmp_path / "config.json", "old " * 10_000, "new " * 10_000
    for fatal in (1, 2, 3, 4):  # it opens the file, opens it to flush it, and renames it
        path.write_text(old)
        dead = dies_before_change(fatal, lambda: write_text(path, new))
        assert path.read_text() == (old if dead else new) and dead == (fatal < 4)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("harm", [lambda data: data[: len(data) // 2], lambda data: b"[]", None])
@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "config.json"])
def test_damage_is_set_aside_and_the_checkpoint_before_is_used(name, harm, write, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    (folder / "step_000002_good").mkdir(parents=True)
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, write, {"step": step}, keep=2)
    file = folder / "step_1000000" / name
    file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
    assert saved_step(tmp_path) == 999_999
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "step_1000000 is damaged" in printed
    checkpoint.save(tmp_path, 1_000_000, write, {"step": 4}, keep=1)
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["step_000002_good", "step_1000000", "step_1000000.damaged"]
    file.write_bytes(b"")  # now none is whole: that is no reason to begin anew
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        saved_step(tmp_path)
    assert len(list(folder.iterdir())) == 3


PASSING = [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
PASSING += [OSError(116, "Stale file handle"), OSError(24, "Too many open files"), MemoryError()]
PASSING += [RuntimeError("state.pt was written by a newer PyTorch"), ImportError("no module")]


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("where", ["state", "weights"])
def test_what_cannot_be_read_for_a_moment_is_no_damage(where, error, write, tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, write, {"step": step}, keep=2)
    fail = Mock(side_effect=error)
    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(torch, "load", fail)
        with pytest.raises(UserError, match="step_000004 cannot be read now"):
            checkpoint.load(tmp_path, fail if where == "weights" else load_model)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000002", "step_000004"]
    assert saved_step(tmp_path) == 4


# --- whatever ends a run


def test_an_unforeseen_error_of_the_data_saves_what_is_finished(tmp_path):
    """In the data thread, after three batches; the same command then goes on at step 3."""
    config = Config(out_dir=str(tmp_path), max_steps=6, batch_size=2, chunk=8, max_seq=24, seed=1)
    config = phases(config)["baseline"]
    tokenizer = load_tokenizer("world")
    policy = Llama(preset("world", tokenizer.vocab_size)).initialise(0)

    class Broken(WorldSource):
        def documents(self, start=None):
            for number, document in enumerate(super().documents(start)):
                if number == 4 * 2:  # whole batches are prepared ahead
                    raise ZeroDivisionError("unforeseen")
                yield document

    stream = open_stream(Broken(), tokenizer, dataclasses.replace(config, window=2))
    with pytest.raises(ZeroDivisionError):
        train.train(policy, policy, stream, first_wins, None, tokenizer, config)
    _, state = checkpoint.load(Path(config.out_dir), load_model)
    assert state["step"] == 4 == len(log_of(config.out_dir))


STUBBORN = """
import hashlib
from support import command
with command.listening():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without a line of Python
"""


def test_a_second_interrupt_ends_at_once_whatever_is_done():
    how = dict(cwd=command.ROOT, stdout=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], **how)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # heard, but only where it can be saved
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
