"""Pictures of runs: python plot.py RUN [RUN2 ...]

In: run folders' log.jsonl and summary.json, finished or not. Out: RUN/training.png with the reward,
the share of each source among the chosen, and the evaluation (the loss where nothing is judged, of
the base and the baseline before the method begins); of several runs RUN/compared.png, in the first
one's folder, with their curves over each other.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from evaluation.results import NAMES, overall


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Centred moving average; near the ends over what there is."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def read_log(run: Path) -> list[dict]:
    """The lines of a run's log, none before its method begins; the last one of a run that still
    writes may be cut off."""
    path, lines = run / "log.jsonl", []
    if not path.exists() and (run / "environment.json").exists():  # it trains its base
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def read_summary(run: Path) -> dict:
    """What the evaluation found, {} before it."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def draw_curve(ax, log: list[dict], key: str, label: str):
    """A number of the log over the steps, smoothed, and faintly as it is."""
    points = [(line["step"] + 1, line[key]) for line in log if line.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        (curve,) = ax.plot(steps, smooth(list(values)), label=label)
        ax.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)


def draw_losses(ax, run: Path, log: list[dict]):
    """The loss of a run, before its method begins those of its base and its baseline."""
    before = [run / name for name in ("base", "baseline") if (run / name / "log.jsonl").exists()]
    logs = {run.resolve().name: log} if log else {path.name: read_log(path) for path in before}
    for name, lines in logs.items():
        draw_curve(ax, lines, "loss", NAMES.get(name, name))
    finish(ax, "loss")


def draw_curves(ax, log: list[dict], prefix: str, names: list[str], ylabel: str):
    for name in names:
        draw_curve(ax, log, prefix + name, name)
    finish(ax, ylabel)


def finish(ax, ylabel: str):
    ax.set(xlabel="step", ylabel=ylabel)
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)


def draw_evaluation(ax, summary: dict):
    """Groups of bars, a group a suite, a bar a policy; the mean over all judged prefixes."""
    policies, suites = summary["policies"], summary["suites"]
    width = 0.8 / len(policies)
    for i, (name, row) in enumerate(policies.items()):
        means = [overall(row, suite) for suite in suites]
        at = [x + (i - (len(policies) - 1) / 2) * width for x in range(len(suites))]
        bars = ax.bar(
            at, [100 * (mean or 0.0) for mean in means], width, label=NAMES.get(name, name)
        )
        labels = ["-" if mean is None else f"{100 * mean:.0f}" for mean in means]
        ax.bar_label(bars, labels, fontsize=8)
    ax.set_xticks(range(len(suites)), suites)
    ax.set(ylabel="% (held-out prefixes)", ylim=(0, 115))
    ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(policies))


def plot_run(run: Path) -> Path:
    """Draw RUN/training.png and give its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log, summary = read_log(run), read_summary(run)
    first = log[0] if log else {}
    sources = sorted(k.removeprefix("chosen.") for k in first if k.startswith("chosen."))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    rewards = [k.removeprefix("reward.") for line in log for k in line if k.startswith("reward.")]
    rewards = sorted(set(rewards) - {"rollout"})
    if parts := [name for name in rewards if "." in name]:  # a teacher's run (figures 5 to 7)
        kinds = [name for name in rewards if "." not in name]
        draw_curves(axes[0], log, "reward.", kinds, "reward by kind of prompt")
        draw_curves(axes[1], log, "reward.", parts, "share")
    else:
        if rewards:
            draw_curves(axes[0], log, "reward.", sources, "reward (sum over kinds)")
        else:
            draw_losses(axes[0], run, log)
        draw_curves(axes[1], log, "chosen.", sources, "share of the chosen")
    axes[1].set_ylim(0, 1)
    if summary:
        draw_evaluation(axes[2], summary)
    path = run / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


COMPARED = {
    "reward": "reward (mean over all candidates)",
    "reward.rollout": "reward of the rollouts",
    "chosen.rollout": "rollouts among the chosen",
    "loss": "loss",
    "rollout.nll": "surprise of the rollouts (nats a token)",
}


def run_names(runs: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def plot_runs(runs: list[Path]) -> Path:
    """Draw the curves of several runs over each other, and how each one's last phase was judged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = run_names(runs)
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for run, name in zip(runs, names, strict=True):
        log = read_log(run)
        for ax, key in zip(axes.flat, COMPARED, strict=False):
            draw_curve(ax, log, key, name)
    for ax, ylabel in zip(axes.flat, COMPARED.values(), strict=False):
        finish(ax, ylabel)
    summaries = [read_summary(run) for run in runs]
    policies = {
        name: summary["policies"]["method"]
        for name, summary in zip(names, summaries, strict=True)
        if "method" in summary.get("policies", {})
    }
    if policies:
        suites = [s for summary in summaries for s in summary.get("suites", [])]
        draw_evaluation(
            axes.flat[-1], {"policies": policies, "suites": list(dict.fromkeys(suites))}
        )
    path = runs[0] / "compared.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Draws RUN/training.png of one run, its curves and evaluation; of several "
        "FIRST_RUN/compared.png, their curves over each other."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or not")
    folders = parser.parse_args().runs
    try:
        print(plot_run(folders[0]) if len(folders) == 1 else plot_runs(folders))
    except (FileNotFoundError, NotADirectoryError) as e:
        sys.exit(f"error: {e.filename} does not exist: is that the folder of a run?")
