"""The paper's tables in miniature on the pocket world, the paper's figures beside ours.

    python -m study.reproduce --list                 the tables, and which runs are finished
    python -m study.reproduce table6 [rollouts ...]  run what is missing, print the tables
    python -m study.reproduce all

In: configs/TABLE.py:ROW followed by configs/miniature.py (table 2: miniature_scratch.py), one scale
for all rows. Out: OUT/runs/SETTINGS/seedS (run folders of train.py with evaluation.json),
OUT/TABLE.json and .md. A run folder is named by its settings, so a row that several tables share
is trained once. Finished runs are kept and interrupted ones go on. Every policy is compared with
its seed's base by a judge without error, whoever judged the training.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import time
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from statistics import mean

import config as configuration
from support import command
from support.command import ROOT, UserError, python
from support.files import markdown, read_jsonl
from tools.plot import read_json

# Of the paper, and beyond it.
TABLES: tuple[str, ...] = ("table1", "table2", "table6", "rollouts", "pivot", "judge")
TABLES += ("forgetting", "overlap", "rewriter", "schedules")
COLUMNS = {  # in the order of a row's `paper`
    "quality_clean": "quality, clean",
    "quality_unsafe": "quality, unsafe",
    "coherence": "coherence",
    "factuality": "factuality",
    "safety": "safety",
    "nll": "held-out NLL",
}
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
    def from_scratch(self) -> bool:
        return self.table == "table2"

    @property
    def settings(self) -> list[str]:
        """Arguments of train.py, the same for every seed."""
        files = f"{self.table}.py:{self.name}", f"miniature{'_scratch' * self.from_scratch}.py"
        return [str(ROOT / "configs" / file) for file in files]


@cache
def rows_of(table: str) -> list[Row]:
    """The rows of a table in its order, without the base."""
    rows = configuration.read_rows(ROOT / "configs" / f"{table}.py").items()
    return [Row(table, name, row["label"], row.get("paper", ())) for name, row in rows]


@cache
def folder(out: Path, row: Row, seed: int) -> Path:
    """Where this run belongs: equal settings, equal folder, whatever the row is called."""
    values = dataclasses.asdict(configuration.parse(row.settings)[0])
    usual = dataclasses.asdict(configuration.Config())
    changed = {name: value for name, value in sorted(values.items()) if value != usual[name]}
    key = hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:6]  # new keys change nothing
    what = [values["objective"], values["candidates"].replace(",", "-"), f"K{values['rollouts']}"]
    return out / "runs" / "_".join([*what, key]) / f"seed{seed}"


def base(out: Path, seed: int) -> Path:
    return out / "bases" / f"seed{seed}"


# ---- Running ------------------------------------------------------------------------------------


def next_step(out: Path, row: Row, seed: int) -> tuple[Path, list[str]] | None:
    """(folder, command): the base, the training or the evaluation; None: the run is finished."""
    run, start = folder(out, row, seed), base(out, seed)
    if (run / "evaluation.json").exists():
        return None
    if not (start / "summary.json").exists():  # the base is what matters, the method one step
        config = ROOT / "configs" / "miniature.py"
        flags = [f"--out_dir={start}", f"--seed={seed}", "--max_steps=1", "--eval_prefixes=0"]
        return start, python("train", config, *flags)
    if not (run / "summary.json").exists():
        flags = [f"--out_dir={run}", f"--seed={seed}", "--eval_prefixes=0"]
        if not row.from_scratch:
            flags.append(f"--init_from={start / 'base' / 'ckpt'}")
        return run, python("train", *row.settings, *flags)
    compared = ("--baseline", start / "base" / "ckpt", "--out", run / "evaluation.json")
    return run, python("evaluation.evaluate", run / "ckpt", *compared)


def start_process(where: Path, arguments: list[str]) -> subprocess.Popen:
    """One thread, deaf to our Ctrl-C; its output goes to a file beside the folder."""
    where.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with where.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def work(out: Path, jobs: list[tuple[Row, int]], at_once: int) -> list[str]:
    """Bring all runs to their end, in this order, `at_once` at a time. -> what failed."""
    unique: dict[Path, tuple[Row, int]] = {}
    for job in jobs:
        unique.setdefault(folder(out, *job), job)
    waiting = list(unique.values())
    running: dict[Path, tuple[subprocess.Popen, float]] = {}  # by folder; since when
    failed = []
    try:
        while waiting or running:
            for where, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[where]
                what = where.relative_to(out)
                print(f"{what}: {time.time() - began:.0f} s, {len(waiting)} to go", flush=True)
                if process.returncode:  # nor what builds on it
                    failed.append(f"{what} failed, see {where.with_suffix('.log')}")
                    needs = {job: (folder(out, *job), base(out, job[1])) for job in waiting}
                    waiting = [job for job in waiting if where not in needs[job]]
            for job in list(waiting):
                if len(running) == at_once:
                    break
                step = next_step(out, *job)
                if step is None:
                    waiting.remove(job)
                elif step[0] not in running:
                    running[step[0]] = start_process(*step), time.time()
            time.sleep(0.2)
    finally:  # interrupted: the runs save themselves
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


# ---- What came out ------------------------------------------------------------------------------


def record(run: Path) -> dict:
    """The figures of a finished run, in % (win rates against the seed's base) and nats.

    Also those of the base as base.NAME, and of the training: the rollouts' share of the chosen in
    each step (`curve`, 0 to 1), in the first and last quarter (%), questions a prefix.
    """
    policies = read_json(run / "evaluation.json")["policies"]
    out: dict = {}
    for policy, prefix in (("base", "base."), ("checkpoint", "")):
        kinds = policies[policy]
        for name in ("quality", "coherence", "factuality", "safety", "nll"):
            scale = 1 if name == "nll" else 100
            each = {kind: scale * cell[name] for kind, cell in kinds.items()}
            out |= {f"{prefix}{name}_{kind}": value for kind, value in each.items()}
            out[prefix + name] = mean(each.values())
    log = list(read_jsonl(run / "log.jsonl"))
    batch = read_json(run / "config.json")["batch_size"]
    out["curve"] = [line.get("chosen.rollout", 0.0) for line in log]
    quarter = max(1, len(log) // 4)
    out["chosen.first"] = 100 * mean(out["curve"][:quarter])
    out["chosen.last"] = 100 * mean(out["curve"][-quarter:])
    out["questions"] = mean(line.get("judge.calls", 0) for line in log) / batch
    return out


def records(out: Path, row: Row, seeds: list[int]) -> dict[int, dict]:
    """{seed: record} of a row's finished runs."""
    runs = {seed: folder(out, row, seed) for seed in seeds}
    return {s: record(run) for s, run in runs.items() if (run / "evaluation.json").exists()}


def table(out: Path, name: str, seeds: list[int]) -> list[dict]:
    """[{label, row, paper: {column: figure}, ours: {column: {seed: figure}}}]"""
    found = {row: records(out, row, seeds) for row in rows_of(name)}
    if name in BASE:  # its figures stand in the runs that were compared with it
        compared = {seed: r for runs in found.values() for seed, r in runs.items()}
        found = {Row(name, "", "base", BASE[name]): compared, **found}
    lines = []
    for row, runs in found.items():
        prefix = "" if row.name else "base."
        ours = {c: {seed: r[prefix + c] for seed, r in sorted(runs.items())} for c in COLUMNS}
        paper = dict(zip(COLUMNS, row.paper, strict=False))
        lines.append({"label": row.label, "row": row.name, "paper": paper, "ours": ours})
    return lines


def as_markdown(lines: list[dict]) -> str:
    """Mean (each seed), and the paper's figure in brackets."""
    rows = [["", *COLUMNS.values()]]
    for line in lines:
        cells = [line["label"]]
        for column in COLUMNS:
            digits, paper = 2 if column == "nll" else 1, line["paper"].get(column)
            values = line["ours"][column].values()
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cell = f"**{mean(values):.{digits}f}** ({each})" if values else "-"
            cells.append(cell + (f" [{paper}]" if paper is not None else ""))
        rows.append(cells)
    return markdown(rows)


def write_table(out: Path, name: str, seeds: list[int]) -> str:
    lines = table(out, name, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    text = f"{name}: ours, mean (each seed) [the paper's]\n\n{as_markdown(lines)}\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    return text


HOW_TO_RUN = """run what is missing: python -m study.reproduce table6 [rollouts ...], or all
a row takes 1 to 10 minutes of one core for each seed; a seed's base, once for all rows, 5 to 12"""


def listing(out: Path, seeds: list[int]) -> str:
    lines = []
    for name in TABLES:
        lines.append(name)
        for row in rows_of(name):
            finished = sum((folder(out, row, s) / "evaluation.json").exists() for s in seeds)
            lines.append(f"  {finished}/{len(seeds)}  {row.label:<42} {row.key}")
    return "\n".join([*lines, "", HOW_TO_RUN])


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
        print(listing(out, args.seeds))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = work(out, [(r, s) for t in wanted for r in rows_of(t) for s in args.seeds], args.jobs)
    for name in wanted:
        print("\n" + write_table(out, name, args.seeds))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    command.run(main)
