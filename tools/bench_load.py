"""What busy neighbours cost the demo: CPU seconds and wall time beside as many busy loops as cores.

    python -m tools.bench_load [--times 5]

In: 40 base steps and 10 method steps of train.py, with the threads that it chooses for itself, in
turns alone and beside the loops. Out: the medians, and their ratios. The fair share of a process
that has one thread, beside one loop a core, is half a core: twice the wall time.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

from support import command
from support.files import markdown

SMALL = ["--base_steps=40", "--max_steps=10", "--baseline=False", "--eval_prefixes=0", "--track="]


@contextlib.contextmanager
def busy_loops(count: int):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def one_run() -> tuple[float, float]:
    """(CPU seconds, seconds) of a small run from nothing, its start included."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        start = command.python("train", f"--out_dir={folder}/run", *SMALL)
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--times", type=int, default=5, help="runs of each kind, in turns")
    times, cores = flag.parse_args(arguments).times, len(os.sched_getaffinity(0))
    runs = {"alone": [], f"beside {cores} loops": []}
    for _ in range(times):
        for loops, found in zip((0, cores), runs.values(), strict=True):
            with busy_loops(loops):
                found.append(one_run())
        last = (found[-1] for found in runs.values())
        print(*(f"{cpu:.1f} CPU s, {wall:.1f} s" for cpu, wall in last), sep="; ")
    shown = {name: [median(x) for x in zip(*found, strict=True)] for name, found in runs.items()}
    alone, beside = shown.values()
    shown["ratio"] = [b / a for a, b in zip(alone, beside, strict=True)]
    rows = [[name, *(f"{x:.2f}" for x in values)] for name, values in shown.items()]
    print(markdown([["", "CPU seconds", "seconds"], *rows]))


if __name__ == "__main__":
    command.run(main)
