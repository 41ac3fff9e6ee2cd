"""Pictures of a run: python plot.py RUN

In: a run folder's log.jsonl and summary.json. Out: RUN/training.png with the reward, the share of
each source among the chosen, and the evaluation.
"""

import json
import sys
from pathlib import Path

NAMES = {"base": "base", "baseline": "next-token baseline", "method": "self-improving"}


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Centred moving average; near the ends over what there is."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def draw_curves(ax, log: list[dict], prefix: str, names: list[str], ylabel: str):
    for name in names:
        points = [(line["step"] + 1, line[prefix + name]) for line in log if prefix + name in line]
        if points:
            steps, values = zip(*points, strict=True)
            (curve,) = ax.plot(steps, smooth(list(values)), label=name)
            ax.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)
    ax.set(xlabel="step", ylabel=ylabel)
    if ax.lines:
        ax.legend(frameon=False)


def draw_evaluation(ax, summary: dict):
    """Groups of bars, a group a suite, a bar a policy; the mean over the kinds of prefix."""
    policies, suites = summary["policies"], summary["suites"]
    width = 0.8 / len(policies)
    for i, (name, row) in enumerate(policies.items()):
        heights = [
            sum(cell.get(suite) or 0.0 for cell in row.values()) / len(row) * 100
            for suite in suites
        ]
        at = [x + (i - (len(policies) - 1) / 2) * width for x in range(len(suites))]
        bars = ax.bar(at, heights, width, label=NAMES.get(name, name))
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.set_xticks(range(len(suites)), suites)
    ax.set(ylabel="% (held-out prefixes)", ylim=(0, 115))
    ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(policies))


def plot_run(run: Path) -> Path:
    """Draw RUN/training.png and give its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    sources = sorted(k.removeprefix("chosen.") for k in log[0] if k.startswith("chosen."))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    rewards = [k.removeprefix("reward.") for line in log for k in line if k.startswith("reward.")]
    rewards = sorted(set(rewards) - {"rollout"})
    if parts := [name for name in rewards if "." in name]:  # a teacher's run (figures 5 to 7)
        kinds = [name for name in rewards if "." not in name]
        draw_curves(axes[0], log, "reward.", kinds, "reward by kind of prompt")
        draw_curves(axes[1], log, "reward.", parts, "share")
    else:
        draw_curves(axes[0], log, "reward.", sources, "reward (sum over kinds)")
        draw_curves(axes[1], log, "chosen.", sources, "share of the chosen")
    axes[1].set_ylim(0, 1)
    if summary:
        draw_evaluation(axes[2], summary)
    path = run / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python plot.py RUN")
    try:
        print(plot_run(Path(sys.argv[1])))
    except FileNotFoundError as e:
        sys.exit(
            f"error: {e.filename} does not exist: is {sys.argv[1]} the folder of a finished run?"
        )
