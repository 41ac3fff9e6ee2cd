"""What a judge with a taste says of the rollouts, and what they are worth, step by step.

    python -m study.hacking [--out out/study] [--jobs 2]

In: the rows of configs/hacking.py, from study/reproduce.py's base, one seed. Out: OUT/hacking.md,
and the picture OUT/hacking.png. Judged: the share of its comparisons that a rollout wins in its
pool, as the run recorded it; true: the share it wins by its exact quality (world/truth.py).
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean

from study.reproduce import flags, folder, rows_of, work_on
from support import command
from support.command import UserError
from support.files import markdown, read_jsonl, write_text
from support.store import Reader
from tools.plot import figure_of, smooth
from tools.replay import recorded_pools
from world.truth import quality

SIGNS = ("rollout.repeated", "rollout.alike", "rollout.length")  # of the run itself


def won(values: list[float]) -> list[float]:
    """The share of the others that each value beats; a tie is half a win."""
    beaten = [sum((v > w) + (v == w) / 2 for w in values) - 0.5 for v in values]
    return [n / max(len(values) - 1, 1) for n in beaten]


def curves(run: Path) -> dict[str, list[float]]:
    """Means over the rollouts of each step: judged and true (0 to 1), and the run's own signs."""
    found = defaultdict(list)
    for step, _, prefix, _, texts, sources, rewards in recorded_pools(
        Reader(run / "judgments.sqlite")
    ):
        rows = [(t, s, r) for t, s, r in zip(texts, sources, rewards, strict=True) if r == r]
        distinct = list(dict.fromkeys(text for text, *_ in rows))  # as the judge meets them
        true = dict(zip(distinct, won([quality(prefix, t) for t in distinct]), strict=True))
        found[step] += [(reward, true[t]) for t, source, reward in rows if source == "rollout"]
    log = list(read_jsonl(run / "log.jsonl"))
    judged, true = ([mean(x[i] for x in found[line["step"]]) for line in log] for i in (0, 1))
    return {"judged": judged, "true": true} | {s: [line[s] for line in log] for s in SIGNS}


def draw(ax, label: str, found: dict[str, list[float]]):
    for name in ("judged", "true", "rollout.alike", "rollout.length"):
        most = max(found[name]) if name == "rollout.length" else 1
        ax.plot(smooth([value / most for value in found[name]]), label=name)
    ax.set(title=label, xlabel="step", ylabel="share", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


def main(arguments: list[str]):
    args = flags(__doc__).parse_args(arguments)
    if failed := work_on(["hacking"], args):
        raise UserError("; ".join(failed))
    out, lines = args.out.absolute(), [["first -> last 10 steps", "judged", "true", *SIGNS]]
    found = {row: curves(folder(out, row, args.seeds[0])) for row in rows_of("hacking")}
    for row, ours in found.items():
        ends = [f"{mean(v[:10]):.2f} -> {mean(v[-10:]):.2f}" for v in ours.values()]
        lines.append([row.label, *ends])
    panels = [partial(draw, label=row.label, found=ours) for row, ours in found.items()]
    write_text(out / "hacking.md", markdown(lines) + "\n")
    print(f"{markdown(lines)}\n\npicture {figure_of(out / 'hacking.png', panels, rows=2)}")


if __name__ == "__main__":
    command.run(main)
