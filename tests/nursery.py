"""Starts train.py many times: imported once, forked for every run, so that a start costs 10 ms.

run = Run(["--max_steps=3"])              # or processes=2, as torchrun would start them
run.signal(signal.SIGKILL)                # to all of its processes
run.wait()  -> exit code of the first that failed; then run.stdout, run.stderr
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from support import command
from tools import plot

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{command.ROOT}:{Path(__file__).parent}"}
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["nursery"])  # and with it all that is imported here


def child(argv: list, environment: dict, folder: Path, file_limit: int | None):
    """One run of train.py, as `python train.py` would be."""
    os.setsid()
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update({name: str(value) for name, value in environment.items()})
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv[1:] = map(str, argv)
    plot.plot_run = lambda run: run / "training.png"  # a second of a run of three
    sys.exit(command.exit_code(train.main))


class Run:
    """The processes of one start; what they print lies in two files.

    file_limit: bytes after which a file cannot grow, as on a full disk."""

    def __init__(self, argv: list, processes: int = 1, file_limit: int | None = None):
        self.folder, place = Path(tempfile.mkdtemp()), {}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1])
        self.processes = []
        for number in range(processes):
            if processes > 1:
                place = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=processes, **address)
            what = argv, place, self.folder, file_limit
            self.processes.append(server.Process(target=child, args=what, daemon=True))
            self.processes[-1].start()

    def signal(self, number: int):
        for process in self.processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has ended, or has no group yet
                if process.is_alive():
                    os.kill(process.pid, number)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def until_it_logs(self, out: Path):
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
            assert self.alive()
            time.sleep(0.01)

    def wait(self) -> int:
        """-> the exit code, of the first process that failed if one did; minus a signal."""
        for process in self.processes:
            process.join()
        files = [self.folder / name for name in ("stdout", "stderr")]
        self.stdout, self.stderr = (f.read_text() if f.exists() else "" for f in files)
        shutil.rmtree(self.folder)
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def log_of(out) -> list[dict]:
    """log.jsonl without what may differ between two equal runs: seconds, and what they divide."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    timed = ("seconds.", "rollout.tokens_per_second", "judge.")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def weights_of(out) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "ckpt" / "model.safetensors")


def table(out, query: str) -> list:
    """Rows of what a run has recorded; none where it was killed before it made the file."""
    with contextlib.suppress(OSError, sqlite3.OperationalError):
        address = (Path(out) / "judgments.sqlite").resolve(strict=True)
        with contextlib.closing(sqlite3.connect(address, timeout=30)) as db:
            return db.execute(query).fetchall()
    return []


def assert_same_run(a, b):
    """Weights and log of every phase, and every pool: prefixes, candidates, rewards in order."""
    pools = "SELECT step, key, pool FROM pools ORDER BY step, key"
    assert table(a, pools) == table(b, pools) != []
    for phase in ("base", "baseline", "."):
        left, right = Path(a) / phase, Path(b) / phase
        assert left.exists() == right.exists()
        if left.exists():
            assert log_of(left) == log_of(right)
            ours, theirs = weights_of(left), weights_of(right)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
