"""Pictures of runs.

    python -m tools.plot RUN                RUN/training.png: its curves and its evaluation
    python -m tools.plot RUN RUN2 ...       RUN/compared.png: their curves over each other

In: run folders' log.jsonl and summary.json, finished or not. The training's picture shows the
reward, the share of each source among the chosen, and the evaluation (the loss where nothing is
judged, before the method begins that of base and baseline).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evaluation.results import LIKELIHOODS, NAMES, overall
from support import command
from support.command import UserError
from support.files import read_jsonl

COMPARED = {
    "reward": "reward (mean over all candidates)",
    "reward.rollout": "reward of the rollouts",
    "chosen.rollout": "rollouts among the chosen",
    "loss": "loss",
    "rollout.nll": "surprise of the rollouts (nats a token)",
}


def figure_of(path: Path, panels: Sequence[Callable], rows: int = 1) -> Path:
    """Draw each panel(ax) into a grid of so many rows, and give the picture's path."""
    from matplotlib.figure import Figure  # only now: a run draws at its end

    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(4.7 * columns, 3.9 * rows), layout="constrained")
    for ax, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        panel(ax)
    figure.savefig(path, dpi=110)
    return path


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Centred moving average; near the ends over what there is."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def read_log(run: Path) -> list[dict]:
    """The lines of a run's log, none before its method begins. UserError: it is no run."""
    if not any((run / name).exists() for name in ("log.jsonl", "environment.json")):
        raise UserError(f"{run} is not the folder of a run: it has no log.jsonl")
    return list(read_jsonl(run / "log.jsonl"))


def read_json(path: Path) -> dict:
    """An object that a run has written. UserError where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} cannot be read: is its folder that of a run?") from None


def read_summary(run: Path) -> dict:
    """What the evaluation found, {} before it."""
    path = run / "summary.json"
    return read_json(path) if path.exists() else {}


def draw_curves(ax, curves: list[tuple[str, list[dict], str]], **axes):
    """Numbers of logs over the steps, smoothed, and faintly as they are; curves: a label, a log and
    a key of its lines each."""
    for label, log, key in curves:
        points = [(line["step"] + 1, line[key]) for line in log if line.get(key) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            (curve,) = ax.plot(steps, smooth(list(values)), label=label)
            ax.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)
    ax.set(xlabel="step", **axes)
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)


def draw_evaluation(ax, policies: dict, columns: list[str]):
    """Groups of bars, a group a column of the table, a bar a policy; means over all prefixes."""
    width, nats = 0.8 / max(1, len(policies)), set(columns) <= set(LIKELIHOODS)
    for i, (name, row) in enumerate(policies.items()):
        means = [overall(row, column) for column in columns]
        at = [x + (i - (len(policies) - 1) / 2) * width for x in range(len(columns))]
        heights = [(1 if nats else 100) * (mean or 0.0) for mean in means]
        bars = ax.bar(at, heights, width, label=NAMES.get(name, name))
        labels = ["-" if m is None else f"{m:.2f}" if nats else f"{100 * m:.0f}" for m in means]
        ax.bar_label(bars, labels, fontsize=7)
    if policies:
        unit = "nats a token" if nats else "%"
        ax.set(ylabel=f"{unit} (held-out prefixes)")
        ax.set_xticks(range(len(columns)), columns)
        ax.margins(y=0.15)  # for the legend
        ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(policies))


def plot_run(run: Path) -> Path:
    """Draw RUN/training.png and give its path."""
    log, summary = read_log(run), read_summary(run)
    keys = sorted({key for line in log for key in line})
    rewards = [key for key in keys if key.startswith("reward.") and key != "reward.rollout"]
    chosen = [key for key in keys if key.startswith("chosen.")]
    upper, lower = [key.replace("chosen.", "reward.") for key in chosen], chosen
    titles = "reward (sum over kinds)", "share of the chosen"
    if shares := [key for key in rewards if key.count(".") > 1]:  # a teacher's: figures 5 to 7
        upper, lower = [key for key in rewards if key not in shares], shares
        titles = "reward by kind of prompt", "share"
    above, below = ([(k.partition(".")[2], log, k) for k in panel] for panel in (upper, lower))
    if not rewards:  # nothing is judged, or nothing yet: base and baseline come first
        before = {n: list(read_jsonl(run / n / "log.jsonl")) for n in ("base", "baseline")}
        logs, titles = {run.name: log} if log else before, ("loss", titles[1])
        above = [(name, lines, "loss") for name, lines in logs.items()]
    policies, suites = summary.get("policies", {}), summary.get("suites", [])
    panels = [
        partial(draw_curves, curves=above, ylabel=titles[0]),
        partial(draw_curves, curves=below, ylabel=titles[1], ylim=(0, 1)),
        partial(draw_evaluation, policies=policies, columns=suites),
    ]
    cells = [cell for row in policies.values() for cell in row.values()]
    if known := [c for c in LIKELIHOODS if any(cell.get(c) is not None for cell in cells)]:
        panels.append(partial(draw_evaluation, policies=policies, columns=known))
    return figure_of(run / "training.png", panels)


def plot_runs(runs: list[Path]) -> Path:
    """Draw the curves of several runs over each other, and how each one's method was judged."""
    logs = {run: read_log(run) for run in runs}
    panels = []
    for key, ylabel in COMPARED.items():
        curves = [(str(run), log, key) for run, log in logs.items()]
        panels.append(partial(draw_curves, curves=curves, ylabel=ylabel))
    done = {str(run): found for run in runs if (found := read_summary(run)).get("policies")}
    methods = {name: summary["policies"].get("method", {}) for name, summary in done.items()}
    suites = list(dict.fromkeys(suite for s in done.values() for suite in s["suites"]))
    panels.append(partial(draw_evaluation, policies=methods, columns=suites))
    return figure_of(runs[0] / "compared.png", panels, rows=2)


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description="Pictures of a run, or of several over each other")
    flag.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or not")
    runs = flag.parse_args(arguments).runs
    print(plot_run(*runs) if len(runs) == 1 else plot_runs(runs))


if __name__ == "__main__":
    command.run(main)
