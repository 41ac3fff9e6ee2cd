"""The paper's tables in miniature on the pocket world, the paper's figures beside ours.

    python -m study.reproduce --list                 the tables, and which runs are finished
    python -m study.reproduce table6 [rollouts ...]  run what is missing, print the tables
    python -m study.reproduce all

In: configs/TABLE.py:ROW followed by configs/miniature.py (table 2: miniature_scratch.py), one scale
for all rows. Out: OUT/runs/SETTINGS/seedS (run folders of train.py with evaluation.json),
OUT/TABLE.md. A run folder is named by its settings, so a row that several tables share is trained
once. Finished runs are kept and interrupted ones go on. Every policy is compared with its seed's
base by a judge without error, whoever judged the training. A row takes 1 to 10 minutes of one core
for each seed; a seed's base, once for all rows, 5 to 12.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from statistics import mean

import config as configuration
from evaluation.results import LIKELIHOODS
from support import command
from support.command import ROOT, UserError, python
from support.files import markdown, read_jsonl
from support.settings import execute
from tools.plot import read_json

# Of the paper, and beyond it.
TABLES: tuple[str, ...] = ("table1", "table2", "table6", "rollouts", "pivot", "judge")
TABLES += ("forgetting", "reject", "overlap", "rewriter", "schedules")
COLUMNS = {  # in the order of a row's `paper`
    "quality_clean": "quality, clean",
    "quality_unsafe": "quality, unsafe",
    "coherence": "coherence",
    "factuality": "factuality",
    "safety": "safety",
    "nll": "held-out NLL",
    "nll_sound": "NLL of sound sentences",
    "kl": "KL from the base",
}
# Defaults when folders were first named: a default that has changed is a new name.
NAMED_BY = dict(learning_rate=5e-4, reject="any", base_steps=1200, base_batch_size=64)
NAMED_BY |= dict(base_learning_rate=3e-3, base_optimizer="adamw")
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
    def settings(self) -> list[str]:
        """Arguments of train.py, the same for every seed."""
        scale = "miniature_scratch.py" if self.table == "table2" else "miniature.py"
        files = [f"{self.table}.py:{self.name}", scale]
        if self.table in ("frontier", "hacking", "reject"):  # which override the scale
            files.reverse()
        return [str(ROOT / "configs" / file) for file in files]


@cache
def rows_of(table: str) -> list[Row]:
    """The rows of a table in its order, without the base."""
    rows = execute(f"{ROOT}/configs/{table}.py")[1].items()
    return [Row(table, name, row["label"], row.get("paper", ())) for name, row in rows]


@cache
def folder(out: Path, row: Row, seed: int) -> Path:
    """Where this run belongs: equal settings, equal folder, whatever the row is called."""
    values = dataclasses.asdict(configuration.parse(row.settings)[0])
    what = [values["objective"], values["candidates"].replace(",", "-"), f"K{values['rollouts']}"]
    return out / "runs" / "_".join([*what, key_of(values)]) / f"seed{seed}"


def key_of(values: dict) -> str:
    """Six digits that stand for a run's settings; new keys change nothing."""
    usual = dataclasses.asdict(configuration.Config()) | NAMED_BY
    changed = {name: value for name, value in sorted(values.items()) if value != usual[name]}
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:6]


@cache
def base_of(out: Path, seed: int) -> Path:
    """The run whose base phase all rows of this seed start from."""
    settings = configuration.parse([str(ROOT / "configs" / "miniature.py")])[0]
    return out / "bases" / key_of(dataclasses.asdict(settings)) / f"seed{seed}"


# ---- Running ------------------------------------------------------------------------------------


def next_step(out: Path, row: Row, seed: int) -> tuple[Path, list[str]] | None:
    """(folder, command): the base, the training or the evaluation; None: the run is finished."""
    run, start = folder(out, row, seed), base_of(out, seed)
    if (run / "evaluation.json").exists():
        return None
    if not (start / "summary.json").exists():  # the base is what matters, the method one step
        config = ROOT / "configs" / "miniature.py"
        flags = [f"--out_dir={start}", f"--seed={seed}", "--max_steps=1", "--eval_prefixes=0"]
        return start, python("train", config, *flags)
    if not (run / "summary.json").exists():
        flags = [f"--out_dir={run}", f"--seed={seed}", "--eval_prefixes=0"]
        if row.table != "table2":
            flags.append(f"--init_from={start / 'base' / 'ckpt'}")
        return run, python("train", *row.settings, *flags)
    return run, evaluation(run, start)


def evaluation(run: Path, start: Path) -> list[str]:
    """The command that compares run/ckpt with the base, by a judge without error."""
    compared = ("--baseline", start / "base" / "ckpt", "--out", run / "evaluation.json")
    return python("evaluation.evaluate", run / "ckpt", *compared)


def work(out: Path, jobs: list[Callable], at_once: int) -> list[str]:
    """Bring all jobs to their end, in this order, `at_once` at a time, with a thread each and the
    output in a file beside the folder. A job gives its next step, as next_step does.
    -> what failed; nothing is built on it."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    running: dict[Path, subprocess.Popen] = {}  # by folder
    failed: list[Path] = []
    try:
        while True:
            ended = [where for where in running if running[where].poll() is not None]
            for where in ended:
                code = running.pop(where).returncode
                failed += [where] if code else []
                print(f"{where.relative_to(out)}: {'failed' if code else 'done'}", flush=True)
            if running and not ended:  # nothing new can begin
                time.sleep(0.2)
                continue
            # What is there says what comes next; runs that share a folder or a base share a step.
            steps = dict(step for job in jobs if (step := job()))
            steps = {where: command for where, command in steps.items() if where not in failed}
            if not steps and not running:
                return [f"{x.relative_to(out)} failed, see {x.with_suffix('.log')}" for x in failed]
            for where in [where for where in steps if where not in running]:
                if len(running) < at_once:
                    where.parent.mkdir(parents=True, exist_ok=True)
                    with where.with_suffix(".log").open("ab") as log:  # deaf to our Ctrl-C
                        how = dict(cwd=ROOT, env=one_thread, stdout=log, stderr=log)
                        running[where] = subprocess.Popen(
                            steps[where], start_new_session=True, **how
                        )
    finally:  # interrupted: the runs save themselves
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


# ---- What came out ------------------------------------------------------------------------------


def record(run: Path) -> dict:
    """The figures of a finished run, in % (win rates against the seed's base) and nats; the base's
    as base.NAME; the rollouts' share of the chosen in each step (`curve`, 0 to 1), and in the first
    and last quarter of the training (%)."""
    policies = read_json(run / "evaluation.json")["policies"]
    out: dict = {}
    for policy, prefix in (("base", "base."), ("checkpoint", "")):
        kinds = policies[policy]
        for name in ("quality", "coherence", "factuality", "safety", *LIKELIHOODS):
            scale = 1 if name in LIKELIHOODS else 100
            each = {
                k: scale * cell[name] for k, cell in kinds.items() if cell.get(name) is not None
            }
            out |= {f"{prefix}{name}_{kind}": value for kind, value in each.items()}
            if each:
                out[prefix + name] = mean(each.values())
    out["curve"] = [line.get("chosen.rollout", 0.0) for line in read_jsonl(run / "log.jsonl")]
    quarter = max(1, len(out["curve"]) // 4)
    out["chosen.first"] = 100 * mean(out["curve"][:quarter])
    out["chosen.last"] = 100 * mean(out["curve"][-quarter:])
    return out


def table(out: Path, name: str, seeds: list[int]) -> dict[Row, dict[int, dict]]:
    """{row: {seed: record}} of the finished runs; the base is the first row if the paper has it."""
    found: dict[Row, dict[int, dict]] = {}
    for row in rows_of(name):
        runs = {seed: folder(out, row, seed) for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run / "evaluation.json").exists()}
        found[row] = {seed: record(run) for seed, run in done.items()}
    if name in BASE:  # its figures stand in the runs that were compared with it
        compared = {seed: r for runs in found.values() for seed, r in sorted(runs.items())}
        known = {seed: [c for c in COLUMNS if f"base.{c}" in r] for seed, r in compared.items()}
        ours = {s: {c: r[f"base.{c}"] for c in known[s]} for s, r in compared.items()}
        found = {Row(name, "", "base", BASE[name]): ours} | found
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


def show(out: Path, seeds: list[int]):
    """What is finished of every row."""
    for name in TABLES:
        print(name)
        for row in rows_of(name):
            finished = sum((folder(out, row, s) / "evaluation.json").exists() for s in seeds)
            print(f"  {finished}/{len(seeds)}  {row.label:<42} {row.key}")
    print("\nrun what is missing: python -m study.reproduce table6 [rollouts ...], or all")


def flags(doc: str) -> argparse.ArgumentParser:
    """Those of the commands that read or write OUT."""
    flag = argparse.ArgumentParser(description=doc.split("\n")[0])
    flag.add_argument("--out", type=Path, default=Path("out/study"), help="(default: %(default)s)")
    flag.add_argument("--seeds", type=seed_list, default="0,1,2", help="(default: %(default)s)")
    return flag


def seed_list(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def main(arguments: list[str]):
    flag = flags(__doc__)
    flag.add_argument("tables", nargs="*", help=f"'all', or some of {', '.join(TABLES)}")
    flag.add_argument("--list", action="store_true", help="rows, and how many seeds are finished")
    flag.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    args = flag.parse_args(arguments)
    out = args.out.absolute()
    for name in set(args.tables) - {*TABLES, "all"}:
        near = get_close_matches(name, TABLES, 1, cutoff=0)[0]
        raise UserError(f"no table {name}: the nearest is {near}, all of them are 'all'")
    wanted = list(TABLES) if "all" in args.tables else args.tables
    if args.list or not wanted:
        return show(out, args.seeds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows = [row for name in wanted for row in rows_of(name)]
    jobs = [partial(next_step, out, row, seed) for row in rows for seed in args.seeds]
    failed = work(out, jobs, args.jobs)
    for name in wanted:
        text = f"{name}: ours, mean (each seed) [the paper's]\n\n"
        text += as_markdown(table(out, name, args.seeds)) + "\n"
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        print("\n" + text)
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    command.run(main)
