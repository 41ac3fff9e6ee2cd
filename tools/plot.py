"""Pictures of runs.

    python -m tools.plot RUN                RUN/training.png: its curves and its evaluation
    python -m tools.plot RUN RUN2 ...       RUN/compared.png: their curves over each other

In: run folders' log.jsonl and summary.json, finished or not. The training's picture shows the
reward, the share of each source among the chosen, and the evaluation (the loss where nothing is
judged, of the base and the baseline before the method begins).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evaluation.results import NAMES, overall
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


def figure_of(path: Path, panels: Sequence[Callable], rows: int = 1, **grid) -> Path:
    """Draw each panel(ax) into a grid of so many rows, and give the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = -(-len(panels) // rows)
    grid |= {"figsize": (4.7 * columns, 3.9 * rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **grid)
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax)
    figure.savefig(path, dpi=110)
    plt.close(figure)
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


def draw_curve(ax, log: list[dict], key: str, label: str):
    """A number of the log over the steps, smoothed, and faintly as it is."""
    points = [(line["step"] + 1, line[key]) for line in log if line.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        (curve,) = ax.plot(steps, smooth(list(values)), label=label)
        ax.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)


def draw_curves(ax, curves: list[tuple[list[dict], str, str]], **axes):
    """curves: a log, a key and a label each."""
    for curve in curves:
        draw_curve(ax, *curve)
    ax.set(xlabel="step", **axes)
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)


def draw_evaluation(ax, policies: dict, suites: list[str]):
    """Groups of bars, a group a suite, a bar a policy; the mean over all judged prefixes."""
    width = 0.8 / max(1, len(policies))
    for i, (name, row) in enumerate(policies.items()):
        means = [overall(row, suite) for suite in suites]
        at = [x + (i - (len(policies) - 1) / 2) * width for x in range(len(suites))]
        heights = [100 * (mean or 0.0) for mean in means]
        bars = ax.bar(at, heights, width, label=NAMES.get(name, name))
        labels = ["-" if mean is None else f"{100 * mean:.0f}" for mean in means]
        ax.bar_label(bars, labels, fontsize=8)
    if policies:
        ax.set_xticks(range(len(suites)), suites)
        ax.set(ylabel="% (held-out prefixes)", ylim=(0, 115))
        ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(policies))


def plot_run(run: Path) -> Path:
    """Draw RUN/training.png and give its path."""
    log, summary = read_log(run), read_summary(run)
    keys = sorted({key for line in log for key in line})
    chosen = [key for key in keys if key.startswith("chosen.")]
    rewards = [key for key in keys if key.startswith("reward.") and key != "reward.rollout"]
    shares = [key for key in rewards if key.count(".") > 1]  # of a teacher's run

    def curves(names: list[str], **axes):
        mine = [(log, name, name.partition(".")[2]) for name in names]
        return partial(draw_curves, curves=mine, **axes)

    if shares:  # the paper's figures 5 to 7
        kinds = [key for key in rewards if key not in shares]
        first = curves(kinds, ylabel="reward by kind of prompt")
        second = curves(shares, ylabel="share", ylim=(0, 1))
    else:
        sources = [key.replace("chosen.", "reward.") for key in chosen]
        first = curves(sources, ylabel="reward (sum over kinds)")
        second = curves(chosen, ylabel="share of the chosen", ylim=(0, 1))
    if not rewards:
        first = partial(draw_curves, curves=losses(run, log), ylabel="loss")
    how = {"policies": summary.get("policies", {}), "suites": summary.get("suites", [])}
    panels = [first, second, partial(draw_evaluation, **how)]
    return figure_of(run / "training.png", panels)


def losses(run: Path, log: list[dict]) -> list[tuple[list[dict], str, str]]:
    """The loss of a run, before its method begins those of its base and its baseline."""
    if log:
        return [(log, "loss", NAMES.get(run.name, run.name))]
    before = [run / name for name in ("base", "baseline") if (run / name / "log.jsonl").exists()]
    return [(read_log(path), "loss", NAMES[path.name]) for path in before]


def plot_runs(runs: list[Path]) -> Path:
    """Draw the curves of several runs over each other, and how each one's last phase was judged."""
    logs = {str(run): read_log(run) for run in runs}
    panels = []
    for key, ylabel in COMPARED.items():
        curves = [(log, key, name) for name, log in logs.items()]
        panels.append(partial(draw_curves, curves=curves, ylabel=ylabel))
    found = {str(run): summary for run in runs if (summary := read_summary(run)).get("policies")}
    policies = {name: summary["policies"].get("method", {}) for name, summary in found.items()}
    suites = list(dict.fromkeys(s for summary in found.values() for s in summary["suites"]))
    panels.append(partial(draw_evaluation, policies=policies, suites=suites))
    return figure_of(runs[0] / "compared.png", panels, rows=2)


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(
        description="Draws RUN/training.png of one run, its curves and evaluation; of several "
        "FIRST_RUN/compared.png, their curves over each other."
    )
    flag.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or not")
    runs = flag.parse_args(arguments).runs
    print(plot_run(*runs) if len(runs) == 1 else plot_runs(runs))


if __name__ == "__main__":
    command.run(main)
