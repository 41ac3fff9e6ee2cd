"""The paper's tables in miniature on the pocket world, the paper's figures beside ours.

    python -m study.reproduce --list                 the tables, what is finished, the time left
    python -m study.reproduce table6 [rollouts ...]  run what is missing, print the tables
    python -m study.reproduce all                    everything that RESULTS.md rests on

In: configs/TABLE.py:ROW at the scale of configs/miniature.py (table 2: miniature_scratch.py), which
four tables of ours change in places; the demo and teachers.circle are rows, too. Out: run folders
OUT/runs/SETTINGS/seedS with evaluation.json, OUT/TABLE.md, OUT/steps.jsonl (what each step took). A
folder is named by its settings, so a row that several tables share is trained once, and a changed
setting makes new folders for what it touches alone. Finished runs are kept and interrupted ones go
on. The rows of a seed start from the base of its demo (table 2 from nothing, the circle from one of
its own), and are compared with it by a judge without error, whoever judged the training.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from difflib import get_close_matches
from functools import cache
from itertools import zip_longest
from multiprocessing import connection
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

import config as configuration
from config import Config
from evaluation.results import LIKELIHOODS
from study.findings import rows_of_five_seeds
from support import command
from support.command import ROOT, UserError
from support.files import markdown, read_jsonl, write_text
from support.settings import execute
from tools.plot import read_json

# Rows without a file in configs/, and those with one: of the paper, and beyond it.
OWN = {
    "demo": {"base": "base", "baseline": "next-token baseline", "method": "self-improving"},
    "circle": {"teachers": "a policy under teachers trained here"},
    "between": {str(x): f"{x:.0%} of the way from the base to row 1" for x in (0.25, 0.5, 0.75)},
}
TABLES: tuple[str, ...] = ("demo", "circle", "table1", "table2", "table6", "rollouts", "pivot")
TABLES += ("judge", "reasons", "rewriter", "forgetting", "overlap", "schedules", "reject")
TABLES += ("frontier", "between", "hacking")
OVERRIDING = ("frontier", "hacking", "reject", "reasons")  # the scale of miniature.py
COLUMNS = {  # in the order of a row's `paper`
    "quality_clean": "quality, clean",
    "quality_unsafe": "quality, unsafe",
    "coherence": "coherence",
    "factuality": "factuality",
    "safety": "safety",
    "nll": "held-out NLL",
    "nll_sound": "NLL of sound sentences",
    "nll_faulty": "of faulty ones",
    "kl": "KL from the base",
}
# Defaults when folders were first named: a default that has changed is a new name.
NAMED_BY = dict(learning_rate=5e-4, reject="any", base_steps=1200, base_batch_size=64)
NAMED_BY |= dict(base_learning_rate=3e-3, base_optimizer="adamw")
PRELOADED = ["train", "evaluation.evaluate"]  # what steps are made of, seconds to import
BASE = {"table1": (50.0, 50.0, 50.1, 42.3, 76.9)}  # the paper's figures of the initial policy


@dataclasses.dataclass(frozen=True)
class Row:
    table: str
    name: str  # the row of configs/TABLE.py; "": the base itself
    label: str
    paper: tuple = ()  # as far as the paper goes; None: no figure

    @property
    def key(self) -> str:
        return f"{self.table}:{self.name}"

    @property
    def of_demo(self) -> bool:
        return self.table == "demo" or not self.name

    @property
    def settings(self) -> list[str]:
        """Arguments of train.py, the same for every seed."""
        scale = "miniature_scratch.py" if self.table == "table2" else "miniature.py"
        files = [f"{self.table}.py:{self.name}", scale]
        if self.table in OVERRIDING:
            files.reverse()
        return [str(ROOT / "configs" / file) for file in files]


@cache
def rows_of(table: str) -> list[Row]:
    """The rows of a table in its order; the base is the first if the paper has it."""
    if table in OWN:
        return [Row(table, name, label) for name, label in OWN[table].items()]
    rows = execute(f"{ROOT}/configs/{table}.py")[1].items()
    base = [Row(table, "", "base", BASE[table])] if table in BASE else []
    return base + [Row(table, name, row["label"], row.get("paper", ())) for name, row in rows]


@cache
def config_of(row: Row) -> Config:
    return configuration.parse(row.settings)[0]


@cache
def folder(out: Path, row: Row, seed: int) -> Path:
    """Where this run belongs: equal settings, equal folder, whatever the row is called."""
    if row.of_demo:
        return base_of(out, seed)
    if row.table == "circle":
        return out / "circle" / hash_of(execute(f"{ROOT}/configs/circle.py")) / f"seed{seed}"
    if row.table == "between":
        end = folder(out, rows_of("frontier")[0], seed).parent.name
        return out / "runs" / f"{end}_{row.name}" / f"seed{seed}"
    values = dataclasses.asdict(config_of(row))
    what = [values["objective"], values["candidates"].replace(",", "-"), f"K{values['rollouts']}"]
    return out / "runs" / "_".join([*what, key_of(values)]) / f"seed{seed}"


def key_of(values: dict) -> str:
    """Six digits that stand for a run's settings; new keys change nothing."""
    usual = dataclasses.asdict(Config()) | NAMED_BY
    return hash_of({name: value for name, value in sorted(values.items()) if value != usual[name]})


def hash_of(values) -> str:
    text = json.dumps(values).replace(str(ROOT), "")  # a clone may be moved, or be another one
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@cache
def base_of(out: Path, seed: int) -> Path:
    """The demo of this seed, from whose base all rows start."""
    return out / "demo" / key_of(dataclasses.asdict(Config())) / f"seed{seed}"


def seeds_of(row: Row, args) -> list[int]:
    """Those that are asked for; more of a row that a finding with five seeds speaks of, the first
    alone of one that is there for its picture."""
    if row.table == "hacking":
        return args.seeds[:1]
    return sorted({*args.seeds, *(args.more if row.key in rows_of_five_seeds() else ())})


# ---- Running ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """`python -m MODULE ARGUMENTS`; done when `made` is there."""

    made: Path
    estimate: float  # seconds of a quiet core
    module: str
    arguments: tuple
    texts: Path | None = None  # of the base, which an evaluation need not write again

    @property
    def where(self) -> Path:
        return self.made.parent


def steps_of(out: Path, row: Row, seed: int) -> list[Step]:
    """In their order; the last one makes what record() reads."""
    start, run = base_of(out, seed), folder(out, row, seed)
    base, flags = start / "base" / "ckpt", (f"--out_dir={run}", f"--seed={seed}")
    demo = Step(start / "summary.json", 420, "train", (f"--out_dir={start}", f"--seed={seed}"))
    of_base = (base, "--out", base.parent / "evaluation.json")
    steps = [demo, Step(of_base[-1], 10, "evaluation.evaluate", of_base)]
    if row.of_demo:
        return steps[:1]
    if row.table == "circle":
        how = ("--seeds", seed, "--out", run.parent)
        return [Step(run / "figures.json", 1500, "teachers.circle", how)]
    if row.table == "between":
        end = steps_of(out, rows_of("frontier")[0], seed)
        ends = base, end[-1].where / "ckpt", row.name, run / "ckpt"
        steps = [*end, Step(ends[-1], 3, "study.frontier", ("between", *ends))]
    else:
        start_from = () if row.table == "table2" else (f"--init_from={base}",)
        how = (*row.settings, *flags, "--eval_prefixes=0", *start_from)
        steps.append(Step(run / "summary.json", estimate(config_of(row)), "train", how))
    compared = (run / "ckpt", "--baseline", base, "--out", run / "evaluation.json")
    texts = base.parent / "generations.jsonl"
    return [*steps, Step(compared[-1], 10, "evaluation.evaluate", compared, texts)]


def estimate(config: Config) -> float:
    """Seconds of a training in miniature, from its counts: 16 prefixes take 0.6 s with 6 candidates
    and all pairs, 1.9 s with 17."""
    C = configuration.pool_size(config)
    pairs = {"all": C * (C - 1) // 2, "race": 2 * C}.get(config.comparisons, C)
    a_step = 0.1 + 0.065 * C + 0.0052 * pairs * ("quality" in config.rewards)
    return round(config.max_steps * config.batch_size / 16 * a_step, 1)


def pending(jobs: list[list[Step]]) -> list[list[Step]]:
    """What is left of each job; nothing where its last step is done."""
    left = [[] if job[-1].made.exists() else job for job in jobs]
    return [[step for step in job if not step.made.exists()] for job in left]


def time_left(out: Path, jobs: list[list[Step]], at_once: int) -> str:
    """By what steps of the same kind took, or by estimates to the scale of those that are done."""
    took = defaultdict(list)
    for line in read_jsonl(out / "steps.jsonl"):
        took[line["module"], line["estimate"]].append(line["seconds"])
    spent = sum(map(sum, took.values()))
    expected = sum(estimate * len(each) for (_, estimate), each in took.items())
    left = {step.made: step for job in pending(jobs) for step in job}  # rows may share steps
    kinds = [(step.module, step.estimate) for step in left.values()]
    scale = spent / expected if expected else 1.0
    seconds = sum(mean(took[k]) if k in took else scale * k[1] for k in kinds)
    minutes = round(seconds / at_once / 60)
    return f"{len(left)} steps left, about {minutes // 60} h {minutes % 60:02d} min"


def perform(step: Step):
    """A step, in a process forked where all it needs is imported; its output beside its folder."""
    os.setsid()
    os.chdir(ROOT)
    step.where.mkdir(parents=True, exist_ok=True)
    log = os.open(step.where.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if step.texts:
        shutil.copyfile(step.texts, step.where / step.texts.name)
    sys.argv[1:] = map(str, step.arguments)
    sys.exit(command.exit_code(importlib.import_module(step.module).main))


def work(out: Path, jobs: list[list[Step]], at_once: int) -> list[str]:
    """Bring all jobs to their end, in this order, `at_once` steps at a time, with a thread each.
    Jobs may share steps. -> what failed; nothing is built on it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    running: dict = {}  # process -> (step, when it began)
    failed: list[Step] = []
    try:
        while True:
            first = [job[0] for job in pending(jobs) if job]
            busy = {step.made for step in failed} | {step.made for step, _ in running.values()}
            for step in first:
                if len(running) < at_once and step.made not in busy:
                    busy.add(step.made)
                    process = server.Process(target=perform, args=(step,))
                    process.start()
                    running[process] = step, time.monotonic()
            if not running:
                logs = [(step.where, step.where.with_suffix(".log")) for step in failed]
                return [f"{where.relative_to(out)} failed, see {log}" for where, log in logs]
            connection.wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                step, began = running.pop(process)
                seconds, name = time.monotonic() - began, str(step.where.relative_to(out))
                if process.exitcode or not step.made.exists():
                    failed.append(step)
                    print(f"{name}: failed", flush=True)
                    continue
                line = dict(step=name, module=step.module, estimate=step.estimate, seconds=seconds)
                with (out / "steps.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                left = time_left(out, jobs, at_once)
                print(f"{name} {step.module}: done in {seconds:.0f} s; {left}", flush=True)
    finally:  # interrupted: the runs save themselves
        for process in running:
            process.terminate()
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.join()


def work_on(tables, args) -> list[str]:
    """Run what is missing of these tables. -> what failed"""
    from support.runlog import lock  # torch, which a list does without

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, rows = args.out.absolute(), [row for name in tables for row in rows_of(name)]
    jobs = [steps_of(out, row, seed) for row in rows for seed in seeds_of(row, args)]
    with lock(out):
        return work(out, jobs, args.jobs)


# ---- What came out ------------------------------------------------------------------------------


def record(out: Path, row: Row, seed: int) -> dict:
    """The figures of a finished run, in % (win rates against the seed's base) and nats; the base's
    as base.NAME; the rollouts' share of the chosen in each step (`curve`, 0 to 1), and in the first
    and last quarter of the training (%). Under "values" {suite: {kind of prefix: a value each}}."""
    file = steps_of(out, row, seed)[-1].made
    if row.table == "circle":
        return {name: 100 * value for name, value in read_json(file).items()}
    summary, ours = read_json(file), (row.name or "base") if row.of_demo else "checkpoint"
    found: dict = {"values": {}}
    for policy, prefix in (("base", "base."), (ours, "")):
        kinds = summary["policies"][policy]
        for name in ("quality", "coherence", "factuality", "safety", *LIKELIHOODS):
            scale = 1 if name in LIKELIHOODS else 100
            each = {
                k: scale * cell[name] for k, cell in kinds.items() if cell.get(name) is not None
            }
            found |= {f"{prefix}{name}_{kind}": value for kind, value in each.items()}
            if each:
                found[prefix + name] = mean(each.values())
        for kind, suites in summary["values"][policy].items():
            for name, values in suites.items():
                own = found["values"].setdefault(prefix + name, {})
                own[kind] = 100 * np.array(values, dtype=float)  # None becomes nan
    steps = read_jsonl(file.parent / "log.jsonl") if ours in ("method", "checkpoint") else ()
    found["curve"] = [step.get("chosen.rollout", 0.0) for step in steps]
    if found["curve"]:
        quarter = max(1, len(found["curve"]) // 4)
        found["chosen.first"] = 100 * mean(found["curve"][:quarter])
        found["chosen.last"] = 100 * mean(found["curve"][-quarter:])
    return found


def table(name: str, args) -> dict[Row, dict[int, dict]]:
    """{row: {seed: record}} of the finished runs."""
    out = args.out.absolute()
    found: dict[Row, dict[int, dict]] = {}
    for row in rows_of(name):
        seeds = [s for s in seeds_of(row, args) if steps_of(out, row, s)[-1].made.exists()]
        found[row] = {seed: record(out, row, seed) for seed in seeds}
    return found


def as_markdown(found: dict[Row, dict[int, dict]]) -> str:
    """Mean (each seed), and the paper's figure in brackets."""
    lines = [["", *COLUMNS.values()]]
    for row, runs in found.items():
        cells = [row.label]
        for column, paper in zip_longest(COLUMNS, row.paper):
            digits = 2 if column in LIKELIHOODS else 1
            values = [r[column] for r in runs.values() if column in r]
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cell = f"**{mean(values):.{digits}f}** ({each})" if values else "-"
            cells.append(cell + (f" [{paper}]" if paper is not None else ""))
        lines.append(cells)
    return markdown(lines)


def show(args):
    """What is finished of every row."""
    out, jobs = args.out.absolute(), []
    for name in TABLES:
        print(name)
        for row in rows_of(name):
            each = [steps_of(out, row, seed) for seed in seeds_of(row, args)]
            finished = sum(steps[-1].made.exists() for steps in each)
            print(f"  {finished}/{len(each)}  {row.label:<42} {row.key}")
            jobs += each
    print(f"\n{time_left(out, jobs, args.jobs)} with --jobs {args.jobs}")
    print("run what is missing: python -m study.reproduce table6 [rollouts ...], or all")


def flags(doc: str) -> argparse.ArgumentParser:
    """Those of the commands that read or write OUT."""
    flag = argparse.ArgumentParser(description=doc.split("\n")[0])
    flag.add_argument("--out", type=Path, default=Path("out/study"), help="(default: %(default)s)")
    seeds: dict = dict(type=lambda text: [int(seed) for seed in text.split(",") if seed])
    flag.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)", **seeds)
    more = "further ones of rows in findings with five seeds (default: %(default)s)"
    flag.add_argument("--more", default="3,4", help=more, **seeds)
    jobs: dict = dict(type=lambda number: max(1, int(number)), default=os.cpu_count())
    flag.add_argument("--jobs", help="steps at once", **jobs)
    return flag


def main(arguments: list[str]):
    flag = flags(__doc__)
    flag.add_argument("tables", nargs="*", help=f"'all', or some of {', '.join(TABLES)}")
    flag.add_argument("--list", action="store_true", help="rows, and how many seeds are finished")
    args = flag.parse_args(arguments)
    for name in set(args.tables) - {*TABLES, "all"}:
        near = get_close_matches(name, TABLES, 1, cutoff=0)[0]
        raise UserError(f"no table {name}: the nearest is {near}, all of them are 'all'")
    wanted = list(TABLES) if "all" in args.tables else args.tables
    if args.list or not wanted:
        return show(args)
    failed = work_on(wanted, args)
    for name in wanted:
        text = f"{name}: ours, mean (each seed) [the paper's]\n\n"
        text += as_markdown(table(name, args)) + "\n"
        write_text(args.out / f"{name}.md", text)
        print("\n" + text)
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    command.run(main)
