"""What a comparison schedule costs in training and what it buys, end to end in the pocket world.

    python study_training.py RUN [RUN2 ...]      finished runs of train.py, one a seed

In: the bases of those runs. Each is trained by DPO on K rollouts for quality, under a judge that
errs in a tenth of its verdicts, with each schedule. Out: a table, and docs/schedules.png: the win
rate against the base by a judge without error, mean and each seed. Two runs at a time; a finished
one is not run again.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evaluate import overall
from world import start_teacher

STEPS, BATCH, NOISE = 40, 16, 0.1
SCHEDULES = ("all", "race", "pivot")


def train(base: Path, seed: int, K: int, comparisons: str, exact_judge: str) -> dict:
    """One run. -> quality win rate and questions a step."""
    out = base / "schedules" / f"{comparisons}_{K}"
    if not (out / "summary.json").exists():
        flags = dict(
            out_dir=out,
            init_from=base / "base" / "ckpt",
            seed=seed,
            max_steps=STEPS,
            batch_size=BATCH,
            rewards="quality",
            candidates="rollouts",
            rollouts=K,
            comparisons=comparisons,
            dials=f"noise={NOISE}",
            eval_judge_url=exact_judge,
            baseline=False,
            eval_prefixes=256,
        )
        command = [sys.executable, str(Path(__file__).with_name("train.py"))]
        command += [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run(
            command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
        )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    method = json.loads((out / "summary.json").read_text())["policies"]["method"]
    asked = statistics.mean(line["judge.calls"] for line in log)
    return {"win": 100 * overall(method, "quality"), "questions": asked / BATCH}


def draw(results: dict, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for (K, name), runs in results.items():
        x = statistics.mean(run["questions"] for run in runs)
        wins = [run["win"] for run in runs]
        style = dict(color=f"C{SCHEDULES.index(name)}", marker="o" if K == 8 else "s")
        ax.plot([x] * len(wins), wins, linestyle="", alpha=0.4, **style)
        ax.plot(x, statistics.mean(wins), label=f"{name}, K = {K}", markersize=10, **style)
    ax.legend(frameon=False, ncols=2, title="large: mean over the seeds")
    ax.set(xscale="log", xlabel="questions a prefix", ylabel="quality win rate against the base, %")
    figure.savefig(file, dpi=110)


def main(runs: list[str]):
    jobs = [(K, name, seed) for K in (8, 16) for name in SCHEDULES for seed in range(len(runs))]
    with start_teacher() as exact, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: train(Path(runs[job[2]]), job[2], *job[:2], exact), jobs))
    results = {}
    for (K, name, _), result in zip(jobs, done, strict=True):
        results.setdefault((K, name), []).append(result)
    print("| K | schedule | questions a prefix | quality win rate | each seed |")
    print("| --- | --- | --- | --- | --- |")
    for (K, name), found in results.items():
        wins = [run["win"] for run in found]
        questions = statistics.mean(run["questions"] for run in found)
        each = ", ".join(f"{win:.1f}" for win in wins)
        print(f"| {K} | {name} | {questions:.0f} | {statistics.mean(wins):.1f} | {each} |")
    draw(results, Path(__file__).with_name("docs") / "schedules.png")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python study_training.py RUN [RUN2 ...]")
    main(sys.argv[1:])
