"""The paper's tables in miniature on the pocket world, the paper's figures beside ours.

    python reproduce.py --list                 the tables, and which runs are finished
    python reproduce.py table6 [rollouts ...]  run what is missing, print the tables ('all': all)

In: the rows of tables.py: configs/NAME.py followed by configs/miniature.py, one scale for all rows.
Out: OUT/runs/SETTINGS/seedS (run folders of train.py with evaluation.json), OUT/TABLE.json and .md.
A run folder is named by its settings, so a row that several tables share is trained once. Finished
runs are kept and interrupted ones go on. Every policy is compared with its seed's base by a judge
without error, whoever judged the training.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import config as configuration
from study.tables import COLUMNS, TABLES, Row
from support.command import UserError, python

HERE = Path(__file__).parents[1]


def settings(row: Row) -> list[str]:
    """Arguments of train.py that make this row, the same for every seed."""
    scale = "miniature_scratch" if row.config.startswith("table2") else "miniature"
    changes = [f"--{name}={value}" for name, value in row.changes.items()]
    return [str(HERE / "configs" / f"{name}.py") for name in (row.config, scale)] + changes


def folder(out: Path, row: Row, seed: int) -> Path:
    """Where this run belongs: equal settings, equal folder, whatever the row is called."""
    values = dataclasses.asdict(configuration.parse(settings(row))[0])
    usual = dataclasses.asdict(configuration.Config())
    changed = {name: value for name, value in sorted(values.items()) if value != usual[name]}
    key = hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:6]  # new keys change nothing
    what = [values["objective"], values["candidates"].replace(",", "-"), f"K{values['rollouts']}"]
    return out / "runs" / "_".join([*what, key]) / f"seed{seed}"


def base(out: Path, seed: int) -> Path:
    return out / "bases" / f"seed{seed}"


def next_step(out: Path, row: Row, seed: int) -> tuple[Path, list[str]] | None:
    """(folder, command): the base, the training or the evaluation; None: the run is finished."""
    run, start = folder(out, row, seed), base(out, seed)
    if (run / "evaluation.json").exists():
        return None
    if not (start / "summary.json").exists():  # the base is what matters, the method one step
        config = HERE / "configs" / "miniature.py"
        flags = (f"--out_dir={start}", f"--seed={seed}", "--max_steps=1", "--eval_prefixes=0")
        return start, python("train", config, *flags)
    if not (run / "summary.json").exists():
        flags = [f"--out_dir={run}", f"--seed={seed}", "--eval_prefixes=0"]
        if not row.config.startswith("table2"):
            flags.append(f"--init_from={start / 'base' / 'ckpt'}")
        return run, python("train", *settings(row), *flags)
    compared = ("--baseline", start / "base" / "ckpt", "--out", run / "evaluation.json")
    return run, python("evaluation.evaluate", run / "ckpt", *compared)


def start_process(where: Path, command: list[str]) -> subprocess.Popen:
    """One thread, deaf to our Ctrl-C; its output goes to a file beside the folder."""
    where.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with where.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=HERE, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def work(out: Path, jobs: list[tuple[Row, int]], at_once: int) -> list[str]:
    """Bring all runs to their end, in this order, `at_once` at a time. -> what failed."""
    unique = {}
    for job in jobs:
        unique.setdefault(folder(out, *job), job)
    waiting = list(unique.values())
    running, failed = {}, []  # {folder: (process, what it does, since when)}
    try:
        while waiting or running:
            for where, (process, what, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[where]
                print(f"{what}: {time.time() - began:.0f} s, {len(waiting)} to go", flush=True)
                if process.returncode:
                    failed.append(f"{what} failed, see {where.with_suffix('.log')}")
                    waiting = [
                        job
                        for job in waiting
                        if where not in (folder(out, *job), base(out, job[1]))
                    ]
            for job in list(waiting):
                if len(running) == at_once:
                    break
                step = next_step(out, *job)
                if step is None:
                    waiting.remove(job)
                elif step[0] not in running:
                    what = f"{step[0].relative_to(out)}"
                    running[step[0]] = start_process(*step), what, time.time()
            time.sleep(0.2)
    finally:  # interrupted: the runs save themselves
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


# ------------------------------------------------------------------------------------------------
# What came out


def record(run: Path) -> dict:
    """The figures of a finished run, in % (win rates against the seed's base) and nats.

    Also those of the base as base.NAME, and of the training: the rollouts' share of the chosen in
    each step (`curve`) and in the first and last quarter, questions a prefix, seconds a step.
    """
    policies = json.loads((run / "evaluation.json").read_text())["policies"]
    out = {}
    for policy, prefix in (("base", "base."), ("checkpoint", "")):
        kinds = policies[policy]
        for name in ("quality", "coherence", "factuality", "safety", "nll"):
            scale = 1 if name == "nll" else 100
            each = {kind: scale * cell[name] for kind, cell in kinds.items()}
            out |= {f"{prefix}{name}_{kind}": value for kind, value in each.items()}
            out[prefix + name] = statistics.mean(each.values())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch = json.loads((run / "config.json").read_text())["batch_size"]
    out["curve"] = [line.get("chosen.rollout", 0.0) for line in log]
    quarter = max(1, len(log) // 4)
    out["chosen.first"] = statistics.mean(out["curve"][:quarter])
    out["chosen.last"] = statistics.mean(out["curve"][-quarter:])
    out["questions"] = statistics.mean(line.get("judge.calls", 0) for line in log) / batch
    out["seconds"] = statistics.median(line["seconds.step"] for line in log)
    return out


def records(out: Path, row: Row, seeds: list[int]) -> dict[int, dict]:
    """{seed: record} of a row's finished runs."""
    runs = {seed: folder(out, row, seed) for seed in seeds}
    return {s: record(run) for s, run in runs.items() if (run / "evaluation.json").exists()}


def table(out: Path, name: str, seeds: list[int]) -> list[dict]:
    """[{label, config, changes, paper: {column: figure}, ours: {column: {seed: figure}}}]"""
    found = {row.label: records(out, row, seeds) for row in TABLES[name] if row.config}
    any_run = {seed: r for row in found.values() for seed, r in row.items()}
    lines = []
    for row in TABLES[name]:
        prefix, runs = ("", found[row.label]) if row.config else ("base.", any_run)
        ours = {c: {seed: r[prefix + c] for seed, r in sorted(runs.items())} for c in COLUMNS}
        paper = dict(zip(COLUMNS, row.paper, strict=False))
        lines.append(dataclasses.asdict(row) | {"paper": paper, "ours": ours})
    return lines


def markdown(lines: list[dict]) -> str:
    """Mean (each seed), and the paper's figure in brackets."""
    rows = [["", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    for line in lines:
        cells = [line["label"]]
        for column in COLUMNS:
            digits, paper = 2 if column == "nll" else 1, line["paper"].get(column)
            values = [f"{value:.{digits}f}" for value in line["ours"][column].values()]
            mean = statistics.mean(line["ours"][column].values()) if values else None
            cell = "-" if mean is None else f"**{mean:.{digits}f}** ({', '.join(values)})"
            cells.append(cell + (f" [{paper}]" if paper is not None else ""))
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table(out: Path, name: str, seeds: list[int]) -> str:
    lines = table(out, name, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(lines, indent=2) + "\n")
    text = f"{name}: ours, mean (each seed) [the paper's]\n\n{markdown(lines)}\n"
    (out / f"{name}.md").write_text(text)
    return text


HOW_TO_RUN = """run what is missing: python reproduce.py table6 [rollouts ...], or reproduce.py all
a row takes 1 to 10 minutes of one core for each seed; a seed's base, once for all rows, 5 to 12"""


def listing(out: Path, seeds: list[int]) -> str:
    lines = []
    for name, rows in TABLES.items():
        lines.append(name)
        for row in rows:
            if row.config:
                changes = " ".join(f"--{key}={value}" for key, value in row.changes.items())
                runs = [folder(out, row, seed) / "evaluation.json" for seed in seeds]
                finished = sum(run.exists() for run in runs)
                lines.append(f"  {finished}/{len(seeds)}  {row.label:<40} {row.config} {changes}")
    return "\n".join([*lines, "", HOW_TO_RUN])


def seed_list(text: str) -> list[int]:
    """The value of --seeds: 0,1,2"""
    return [int(seed) for seed in text.split(",")]


def main(argv: list[str]) -> int:
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("tables", nargs="*", help=f"'all', or some of {', '.join(TABLES)}")
    flag.add_argument("--list", action="store_true", help="rows, and how many seeds are finished")
    flag.add_argument("--out", type=Path, default=Path("out/study"), help="(default: %(default)s)")
    flag.add_argument("--seeds", type=seed_list, default="0,1,2", help="(default: %(default)s)")
    flag.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    args = flag.parse_args(argv)
    out = args.out.absolute()
    wanted = list(TABLES) if "all" in args.tables else args.tables
    if unknown := [name for name in wanted if name not in TABLES]:
        known = f"{', '.join(TABLES)}, and all of them: all"
        flag.error(f"no table {', '.join(unknown)}; there are {known}")
    if args.list or not wanted:
        print(listing(out, args.seeds))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows = [row for name in wanted for row in TABLES[name] if row.config]
    jobs = [(row, seed) for row in rows for seed in args.seeds]
    try:
        failed = work(out, jobs, args.jobs)
    except KeyboardInterrupt:
        print("interrupted: the runs are saved, the same command goes on", file=sys.stderr)
        return 130
    for name in wanted:
        print("\n" + write_table(out, name, args.seeds))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        sys.exit(f"error: {e}")
