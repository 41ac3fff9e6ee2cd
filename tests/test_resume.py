"""Runs that are killed, interrupted or out of disk, and what the next start makes of them.

The default kills five times. `NANOSIP_FULL=1 pytest tests/test_resume.py -s -k killed` kills 52
times, over one and two processes and overlap 0 and 1, and prints in which phase.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from faulty_server import faulty_server
from safetensors.torch import load_file

import train
from config import Config, phases
from data import open_stream
from judge import first_wins
from model import Llama, ModelConfig, load_model, preset
from support import checkpoint, command
from support.command import UserError
from support.runlog import WINDOW, Collapse
from support.tokenizer import from_words, load_tokenizer
from world import teacher
from world.corpus import WorldSource

FULL = bool(os.environ.get("NANOSIP_FULL"))
TINY = ["--base_steps=10", "--base_batch_size=8", "--max_steps=6", "--batch_size=4", "--rollouts=2"]
TINY += ["--chunk=8", "--max_seq=24", "--eval_prefixes=4", "--save_every=2"]


def truth(request: dict) -> str:
    return teacher.answer(request["messages"][0]["content"], request["seed"])


def log_of(out) -> list[dict]:
    """log.jsonl without what may differ between two equal runs: seconds, and what they divide."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    timed = ("seconds.", "rollout.tokens_per_second", "judge.")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def table(out, query: str) -> list:
    file = Path(out) / "judgments.sqlite"
    if not file.exists():
        return []
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as db:
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:  # killed before the table was made
            return []


def assert_same_run(a, b):
    """Weights and log of every phase, and every pool: prefixes, candidates and rewards in order."""
    for phase in ("base", "baseline", "."):
        left, right = Path(a) / phase, Path(b) / phase
        assert left.exists() == right.exists()
        if left.exists():
            assert log_of(left) == log_of(right)
            ours, theirs = (load_file(x / "ckpt" / "model.safetensors") for x in (left, right))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pools = "SELECT step, key, pool FROM pools ORDER BY step, key"
    assert table(a, pools) == table(b, pools) != []


PHASES = ["start", "base", "baseline", "method", "evaluation"]


def phase(out: Path) -> str:
    """How far a run has come, by what it left on the disk."""
    if (out / "checkpoints" / "step_000006").exists():
        return "evaluation"
    names = {"method": out, "baseline": out / "baseline", "base": out / "base"}
    return next((name for name, at in names.items() if (at / "log.jsonl").exists()), "start")


class Runs:
    """Starts runs of one kind with a teacher of their own, and keeps an uninterrupted one."""

    def __init__(self, born, server, folder: Path):
        self.born, self.server, self.folder, self.whole = born, server, folder, {}

    def start(self, out, *flags, processes=1, overlap=0, **how):
        url = [f"--judge_url={self.server.url}", f"--rewrite_url={self.server.url}"]
        argv = [f"--out_dir={out}", *TINY, *url, f"--overlap={overlap}", *flags]
        return self.born.start(argv, processes, **how)

    def reference(self, processes=1, overlap=0) -> tuple[Path, float]:
        """(folder, seconds) of the uninterrupted run."""
        kind = (processes, overlap)
        if kind not in self.whole:
            out, began = self.folder / f"whole_{processes}_{overlap}", time.monotonic()
            run = self.start(out, processes=processes, overlap=overlap)
            assert run.wait() == 0, run.stdout + run.stderr
            self.whole[kind] = out, time.monotonic() - began
        return self.whole[kind]

    def kill_and_go_on(self, out, rng, kills: int, longest: float, **kind) -> Counter:
        """Start the run, kill it within `longest` seconds of reaching a random phase, again and
        again until it ends or has been killed `kills` times; then let it end. -> kills by phase"""
        fell, stored, seen, again = Counter(), set(), Counter(), 0
        goals = sorted(rng.choices(range(len(PHASES)), k=kills))
        while True:
            run, until = self.start(out, **kind), math.inf
            goal = goals.pop(0) if goals else len(PHASES)  # never reached
            while run.alive() and time.monotonic() < until:
                if until == math.inf and PHASES.index(phase(out)) >= goal:
                    until = time.monotonic() + rng.uniform(0, longest)
                time.sleep(0.01)
            where = phase(out)
            run.kill()
            code = run.wait()
            fell.update([where] if code == -signal.SIGKILL else [])
            # Keys of the answers are hashes of the requests' bodies, by which the server counts.
            again += sum(self.server.seen[key.hex()] - seen[key.hex()] for (key,) in stored)
            stored = set(table(out, "SELECT key FROM answers"))
            seen = self.server.seen.copy()
            if code != -signal.SIGKILL or (out / "summary.json").exists():
                assert code in (0, -signal.SIGKILL), run.stdout + run.stderr
                assert again == 0, f"{again} answered questions were asked again"
                return fell


@pytest.fixture(scope="module")
def runs(born, tmp_path_factory):
    with faulty_server(answer=truth) as server:
        yield Runs(born, server, tmp_path_factory.mktemp("runs"))


KINDS = [(1, 0, 13), (1, 1, 13), (2, 0, 13), (2, 1, 13)] if FULL else [(1, 0, 2), (2, 1, 3)]


@pytest.mark.parametrize(("processes", "overlap", "kills"), KINDS)
def test_killed_runs_end_as_if_they_had_not_been(runs, processes, overlap, kills, tmp_path):
    kind = dict(processes=processes, overlap=overlap)
    whole, seconds = runs.reference(**kind)
    rng, fell, number = random.Random(f"{processes} {overlap}"), Counter(), 0
    while fell.total() < kills:
        out, number = tmp_path / f"killed{number}", number + 1
        left = kills - fell.total()
        fell += runs.kill_and_go_on(out, rng, left, 0.3 * seconds, **kind)
        assert_same_run(whole, out)
    print(f"\n{kind}: {number} runs, {fell.total()} kills: {dict(fell)}", flush=True)


def test_a_signal_to_one_process_saves_and_stops_all(runs, tmp_path):
    kind, out = dict(processes=2, overlap=1), tmp_path / "stopped"
    whole, _ = runs.reference(**kind)
    run = runs.start(out, **kind)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert run.alive()
        time.sleep(0.01)
    os.kill(run.pids[1], signal.SIGTERM)
    began = time.monotonic()
    assert run.wait() == 130 and time.monotonic() - began < 20
    assert run.stderr.count("the same command goes on with it") == 1
    run = runs.start(out, **kind)
    assert run.wait() == 0 and "going on with the unfinished run" in run.stdout
    assert_same_run(whole, out)


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_ends_in_one_line_and_harms_no_checkpoint(runs, tmp_path):
    """The last checkpoint is damaged, the disk is full when it is written again, then it is not."""
    whole, out = runs.reference()[0], tmp_path / "full"
    shutil.copytree(whole, out, symlinks=True)
    (out / "summary.json").unlink()
    settings = (out / "config.json").read_text()
    (out / "config.json").write_text(settings.replace(str(whole), str(out)))
    damaged = out / "checkpoints" / "step_000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    before = contents(out / "checkpoints" / "step_000004")
    for limit in (1 << 20, 3 << 20):  # in the middle of the weights, of the optimiser's state
        run = runs.start(out, file_limit=limit)
        assert run.wait() == 1 and "Traceback" not in run.stderr
        assert f"checkpoint {damaged.parent} is damaged" in run.stdout
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: cannot write the checkpoint {out}/checkpoints/step_000006 ")
    assert contents(out / "checkpoints" / "step_000004") == before
    assert not list((out / "checkpoints").glob(".writing*"))
    assert runs.start(out).wait() == 0
    assert_same_run(whole, out)


def test_a_folder_that_cannot_be_written_is_one_line(runs):
    run = runs.start("/proc/run")  # not even root can write there
    assert run.wait() == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: /proc/run: ")


def test_a_process_without_a_prefix_changes_nothing(runs, tmp_path):
    """A batch of one prefix on two processes, of which the second never has any."""
    flags = ["--batch_size=1", "--base_steps=1", "--base_batch_size=1", "--max_steps=2"]
    flags += ["--baseline=False", "--eval_prefixes=0"]
    for processes in (1, 2):
        run = runs.start(tmp_path / str(processes), *flags, processes=processes)
        assert run.wait() == 0, run.stdout + run.stderr
    for one, two in zip(log_of(tmp_path / "1"), log_of(tmp_path / "2"), strict=True):
        assert one["reward"] == two["reward"] and one["skipped"] == two["skipped"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("status", "message"),
    [("401", "Incorrect API key"), ("400", "maximum context length is 4096 tokens")],
)
def test_a_refusal_ends_a_run_at_once_with_the_servers_words(runs, status, message, tmp_path):
    """Here after 100 answers; the steps before are saved."""

    def answer(request):
        if sum(server.counts.values()) > 100:
            server.share = 1.0
        return truth(request)

    with faulty_server([status], 0.0, answer=answer, message=message) as server:
        url = [f"--judge_url={server.url}", f"--rewrite_url={server.url}"]
        flags = ["--base_steps=1", "--baseline=False", "--eval_prefixes=0", "--save_every=9", *url]
        run = runs.start(tmp_path / "out", *flags)
        assert run.wait() == 1 and "Traceback" not in run.stderr
    done = len(log_of(tmp_path / "out"))
    assert done > 0 and (tmp_path / "out" / "ckpt").resolve().name == f"step_{done:06d}"
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: {server.url}/chat/completions answered {status}: ")
    assert message in line


def test_a_judge_without_a_verdict_is_no_reward_of_zero(runs, tmp_path):
    with faulty_server(answer=lambda request: "I'm sorry.") as server:
        flags = ["--base_steps=1", "--baseline=False", "--eval_prefixes=0", "--max_steps=1"]
        flags += [f"--judge_url={server.url}", f"--rewrite_url={server.url}", "--judge_retries=0"]
        assert runs.start(tmp_path / "out", *flags).wait() == 0
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert line["skipped"] == line["rewrite.failed"] == 4
    assert line["reward"] is line["reward.quality"] is None
    assert line["judge.absent"] == line["judge.failed"] == line["judge.calls"] > 0


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
    log = [healthy] * WINDOW
    changed = {"rollout.nll": 0.1, "rollout.length": 5.0, "rollout.repeated": 0.9}
    assert Collapse(log).see({"loss": 1.0}) == []
    for name, value in changed.items():
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


def test_a_save_that_dies_anywhere_leaves_one_checkpoint_or_the_other(write, tmp_path):
    """Killed before its 1st, 2nd, ... change to the disk, until it gets through."""
    for keep in (1, 2) if FULL else (1,):
        for fatal in range(1, 100):
            run = tmp_path / f"{keep}_{fatal}"
            checkpoint.save(run, 2, write, {"step": 2}, keep)
            pid = os.fork()
            if not pid:
                count = 0

                def die(event, _, fatal=fatal):
                    nonlocal count
                    if event in ("open", "os.rename", "os.symlink", "os.remove", "os.rmdir"):
                        count += 1
                        if count == fatal:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(die)
                checkpoint.save(run, 4, write, {"step": 4}, keep)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            found = saved_step(run)
            assert found == 4 if code == 0 else found in (2, 4)
            checkpoint.save(run, 6, write, {"step": 6}, keep)
            assert saved_step(run) == 6 and (run / "ckpt" / "config.json").exists()
            if code == 0:
                break
        assert fatal > 10


def test_damage_is_set_aside_and_the_checkpoint_before_is_used(write, tmp_path, capsys):
    harms = (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[]", None)
    for number, (name, harm) in enumerate(
        (name, harm) for name in ("state.pt", "model.safetensors", "config.json") for harm in harms
    ):
        run = tmp_path / str(number)
        mine = run / "checkpoints" / "step_000002_good"
        mine.mkdir(parents=True)
        for step in (2, 4):
            checkpoint.save(run, step, write, {"step": step}, keep=2)
        file = run / "checkpoints" / "step_000004" / name
        file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
        assert saved_step(run) == 2
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "step_000004 is damaged" in printed
        checkpoint.save(run, 4, write, {"step": 4}, keep=1)
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert kept == ["step_000002_good", "step_000004", "step_000004.damaged"]
        file = run / "checkpoints" / "step_000004" / name
        file.write_bytes(b"")  # now none is whole: that is no reason to begin anew
        with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
            saved_step(run)
        assert len(list((run / "checkpoints").iterdir())) == 3
        capsys.readouterr()


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError()]
    + [OSError(116, "Stale file handle"), OSError(24, "Too many open files")]
    + [RuntimeError("state.pt was written by a newer PyTorch"), ImportError("no module")],
    ids=lambda error: str(error) or "memory",
)
@pytest.mark.parametrize("where", ["state", "weights"])
def test_what_cannot_be_read_for_a_moment_is_no_damage(where, error, write, tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, write, {"step": step}, keep=2)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(torch, "load", fail)
        with pytest.raises(UserError, match="step_000004 cannot be read now"):
            checkpoint.load(tmp_path, fail if where == "weights" else load_model)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000002", "step_000004"]
    assert saved_step(tmp_path) == 4


def test_a_failed_write_leaves_no_half_checkpoint(write, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 2, write, {"step": 2}, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(UserError, match="step_000004 .*No space left"):
        checkpoint.save(tmp_path, 4, write, {"step": 4}, 1)
    assert os.listdir(tmp_path / "checkpoints") == ["step_000002"] and saved_step(tmp_path) == 2


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
import hashlib, sys
sys.path.insert(0, {root!r})
from support import command
with command.listening():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without a line of Python
"""


def test_a_second_interrupt_ends_at_once_whatever_is_done():
    code = STUBBORN.format(root=str(command.ROOT))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # heard, but only where it can be saved
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_keys_that_change_no_result_let_a_run_go_on(runs, tmp_path):
    out, flags = tmp_path / "out", ["--base_steps=1", "--baseline=False", "--eval_prefixes=0"]
    run = runs.start(out, *flags, "--max_steps=9")
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert run.alive()
        time.sleep(0.01)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    neutral = ["--concurrency=7", "--timeout=9", "--keep=1", "--track=", "--price_in=3", "--gpus=1"]
    run = runs.start(out, *flags, "--max_steps=9", *neutral, "--save_every=3")
    assert run.wait() == 0 and "going on with the unfinished run" in run.stdout
    assert [line["step"] for line in log_of(out)] == list(range(9))
    (out / "summary.json").unlink()
    run = runs.start(out, *flags, "--max_steps=9", "--beta=0.2")
    assert run.wait() == 0 and "held another run (beta (0.1, now 0.2))" in run.stdout


def test_a_run_that_learns_from_nothing_says_so(runs, tmp_path):
    """A rewriter that refuses everything: no candidate beside the suffix."""
    with faulty_server(answer=lambda request: "I'm sorry, but I can't help with that.") as server:
        flags = ["--base_steps=1", "--baseline=False", "--eval_prefixes=0", "--max_steps=2"]
        flags += ["--candidates=suffix,rewrite", f"--rewrite_url={server.url}"]
        run = runs.start(tmp_path / "out", *flags)
        assert run.wait() == 0, run.stderr
    assert "method: none of 2 steps learned from anything" in run.stdout
    assert "rewrites failed 4" in run.stdout and "loss -" in run.stdout
    assert all(line["loss"] is None and line["skipped"] == 4 for line in log_of(tmp_path / "out"))
