"""A run's folder and what it tells: the lock, log.jsonl, the screen, live monitors, a collapse.

In: a step's numbers, {name: value}; names with dots group what belongs together. Out: log.jsonl, an
object a step; a line and a progress bar on the screen; what TensorBoard or others write.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from support.command import ROOT, UserError
from support.files import numbered, read_jsonl, write_text

# ---- The folder ---------------------------------------------------------------------------------


def lock(run: Path):
    """Hold this folder for this process, until the returned file is closed or it dies."""
    run.mkdir(parents=True, exist_ok=True)
    held = (run / ".lock").open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process works in {run}: choose another folder") from None
    except OSError as e:  # a file system without locks
        print(f"warning: {run} cannot be locked ({e}): start no second run in it")
    return held


def settle(run: Path, settings: dict, other_than: Callable[[Path], list[str]], resume: bool):
    """The run folder, locked: an unfinished run of the same settings goes on, any other is moved
    aside. other_than(config.json): what makes it another run; resume: go on, whatever it is."""
    held, path = lock(run), run / "config.json"
    if path.exists() and not resume:
        other = other_than(path)
        if not other and not (run / "summary.json").exists():
            print(f"going on with the unfinished run in {run}")
        else:
            if Path.cwd().is_relative_to(run.resolve()):
                here = "holds another run and is the current folder"
                raise UserError(f"{run} {here}: choose --out_dir")
            aside = run.rename(numbered(run))
            what = f"another run ({', '.join(other[:3])})" if other else "the finished run"
            print(f"{run} held {what}, which is now {aside}")
            held.close()
            held = lock(run)
    write_text(path, json.dumps(settings, indent=2) + "\n")
    write_text(run / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return held


def environment() -> dict:
    """What a reader needs to repeat the run."""
    commit = ""
    if git := shutil.which("git"):
        command = [git, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    info = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cpu": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


# ---- The log ------------------------------------------------------------------------------------

PARTS = ("data", "rollout", "judge_wait", "update")  # of a step's seconds


class Clock(dict):
    """Seconds of a step by part: `with clock("rollout"): ...` adds to clock["rollout"]."""

    def __init__(self):
        super().__init__(dict.fromkeys(PARTS, 0.0))
        self.began = time.time()

    @contextlib.contextmanager
    def __call__(self, part: str):
        began = time.time()
        try:
            yield
        finally:
            self[part] += time.time() - began

    def stop(self):
        self["step"] = time.time() - self.began
        self["other"] = self["step"] - sum(self[part] for part in PARTS)


class RunLog(contextlib.AbstractContextManager):
    """log.jsonl of a phase, without the lines of steps that a resumed run does again, and what is
    shown of it. On all but one process (active=False) it does nothing."""

    def __init__(self, run: Path, label: str, step: int, steps: int, track: list, active: bool):
        self.label, self.steps, self.active = label, steps, active
        self.seen = self.learned = 0  # steps of this start, and those that learned from something
        self.began = time.time()
        self.stack = contextlib.ExitStack()
        if not active:
            return
        path = run / "log.jsonl"
        kept = [line for line in read_jsonl(path) if line["step"] < step] if step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.stack.enter_context(path.open("a", encoding="utf-8"))
        self.watch = Collapse(kept)
        from support.monitors import Monitors  # where there is something to show

        self.monitors = Monitors(run, track, step)
        self.stack.callback(self.monitors.tell, "close")
        how = dict(total=steps, initial=step, desc=label, disable=None, mininterval=1)
        self.bar = self.stack.enter_context(tqdm(**how))

    def __exit__(self, error, *_):
        self.stack.close()
        if self.active and error is None and self.seen and not self.learned:
            print(f"warning: {self.label}: none of {self.seen} steps learned from anything; "
                  "log.jsonl says what was skipped and what failed")  # fmt: skip

    def sync(self):
        """Wait until the log is on the disk."""
        if self.active:
            os.fsync(self.file.fileno())

    def step(self, line: dict, clock: Clock):
        """Write a step's line, with its seconds, and show it; numbers that are none become null."""
        clock.stop()
        line |= {f"seconds.{name}": round(value, 4) for name, value in clock.items()}
        if "rollout.tokens" in line:
            speed = line["rollout.tokens"] / clock["rollout"] if clock["rollout"] else 0.0
            line["rollout.tokens_per_second"] = round(speed)
        self.seen, self.learned = self.seen + 1, self.learned + math.isfinite(line["loss"])
        if not self.active:
            return
        numbers = {k: v if math.isfinite(v) else None for k, v in line.items()}
        self.file.write(json.dumps(numbers) + "\n")
        self.file.flush()
        self.bar.update(1)
        self.bar.set_postfix_str(", ".join(words(line)))
        notes = self.watch.see(line) + ["NOT FINITE: update skipped"] * bool(line["not_finite"])
        done, judged = line["step"] + 1, "reward" in line
        if judged or notes or done % 100 == 0 or done == self.steps:
            left = (time.time() - self.began) / self.seen * (self.steps - done)
            left = f"{tqdm.format_interval(left)} left"
            place = f"{self.label} step {done:4d} of {self.steps}, {left}"
            self.bar.write("  ".join([place, *words(line), *notes]))
        shown = {k: v for k, v in numbers.items() if k != "step" and v is not None}
        self.monitors.tell("numbers", shown, line["step"])

    def text(self, name: str, text: str, step: int):
        """Show a text, and give it to the monitors."""
        if self.active:
            tqdm.write(text)
            self.monitors.tell("text", name, text, step)


def words(line: dict) -> list[str]:
    """What matters of a step, for the screen."""
    means = {name: line[name] for name in ("loss", "reward") if name in line}
    shown = (f"{k} {v:.3f}" if math.isfinite(v) else f"{k} -" for k, v in means.items())
    out = ["  ".join(shown)]
    if "reward" in line:
        won = [f"{k.partition('.')[2]} {v:.2f}" for k, v in line.items() if k.startswith("chosen.")]
        out += [f"chosen: {', '.join(won)}", f"skipped {line['skipped']:.0f}"]
        if line.get("rewrite.failed"):
            out.append(f"rewrites failed {line['rewrite.failed']:.0f}")
        out.append(f"judge {line['judge.calls']:.0f} ({line['judge.failed']:.0f} failed)")
        out.append(f"{line['seconds.step']:.2f} s")
    return out


# ---- A collapse ---------------------------------------------------------------------------------

WINDOW = 10  # steps that are averaged, at the start of the run and now
COLLAPSED = {  # when, by the two means
    "rollout.nll": lambda before, now: now < 0.2 * before,
    "rollout.length": lambda before, now: not 0.6 * before <= now <= 2 * before,
    "rollout.repeated": lambda before, now: now > max(0.5, 3 * before),  # share of 3-grams
    "rollout.alike": lambda before, now: now > max(0.8, 2 * before),  # hold the same 5 tokens
}


class Collapse:
    """Watches a run for rollouts that lose their entropy, their variety or their usual length, as
    they do when a policy pleases its judge by other means than it should; measured against its own
    first steps. In: the lines of the log. Out: words for the step line."""

    def __init__(self, lines: list[dict]):
        self.first: list[dict] = []
        self.recent: deque[dict] = deque(maxlen=WINDOW)
        for line in lines:
            self.see(line)

    def see(self, line: dict) -> list[str]:
        if line.get("rollout.nll") is None:
            return []
        self.recent.append(line)
        if len(self.first) < WINDOW:
            self.first.append(line)
            return []
        notes = []
        for name, collapsed in COLLAPSED.items():
            if name not in line or name not in self.first[0]:  # a run of an older version
                continue
            before, now = (sum(x[name] for x in xs) / WINDOW for xs in (self.first, self.recent))
            if collapsed(before, now):
                notes.append(f"COLLAPSE: {name} {now:.2f}, {before:.2f} at the start")
        return notes
