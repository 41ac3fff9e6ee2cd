"""Which comparison schedule names the best and the worst of K candidates, at how many questions?

    python -m study.schedules [PNG]    50 s of one core; prints a table, draws out/comparisons.png

Offline, on continuations from the pocket world, whose true quality is known. The judge is simulated
with three dials: noise flips a verdict, bias is how often the first option wins whatever it is,
and blur makes close calls a matter of luck (logistic in the gap of true quality over blur).
"""

import argparse
import random
from functools import partial
from pathlib import Path

import numpy as np

from schedules import schedule
from support import command
from support.files import markdown
from tools.plot import figure_of
from world import corpus, teacher, truth

JUDGES = {
    "exact": dict(noise=0.0, bias=0.0, blur=0.0),
    "noise 0.1": dict(noise=0.1, bias=0.0, blur=0.0),
    "blur 0.1, bias 0.1": dict(noise=0.0, bias=0.1, blur=0.1),
    "noise 0.2, bias 0.2": dict(noise=0.2, bias=0.2, blur=0.0),
}
SCHEDULES = {
    8: ["all", "pivot", 2, 3, 5, "race", "race:0.55", "race:1"],
    16: ["all", "pivot", 2, 4, 7, "race:0.2", "race", "race:0.4", "race:0.6"],
}
HEAD = ["K", "judge", "schedule", "questions", "rounds", "best", "worst", "quality lost"]


def true_qualities(seed: int, k: int) -> np.ndarray:
    """Of k different continuations of one prefix: the original and better and worse rewrites."""
    rng = random.Random(seed)
    words = corpus.document(0, seed).split()
    prefix, texts = " ".join(words[:56]), [" ".join(words[56:88])]
    while len(texts) < k:
        other = " ".join(corpus.document(1, rng.randrange(10**9)).split()[56:88])
        original = rng.choice([texts[0], other])
        dials = corpus.Dials(rewriter_knowledge=rng.random(), rewriter_flaws=rng.random())
        text = teacher.rewrite(prefix, original, dials, str(rng.random()))
        texts += [text] if text not in texts else []
    return np.array([truth.quality(prefix, text) for text in texts])


def answer(quality, first: int, second: int, rng, noise: float, bias: float, blur: float) -> float:
    """1 if the judge says that the first one is better."""
    gap = quality[first] - quality[second]
    first_wins = rng.random() < 1 / (1 + np.exp(-np.clip(gap / max(blur, 1e-9), -50, 50)))
    first_wins |= rng.random() < bias
    return float(first_wins != (rng.random() < noise))


def play(comparisons, quality, seed: int, dials: dict) -> tuple:
    """(questions, rounds, named the best, named the worst, gap to them) of one pool."""
    chance, rng = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    plan, outcomes, questions, rounds = schedule(comparisons, len(quality), 0, rng), None, 0, 0
    while True:
        try:
            pairs = plan.send(outcomes)
        except StopIteration as done:
            scores = done.value + 1e-6 * rng.random(len(quality))  # ties are broken by chance
            break
        questions, rounds = questions + len(pairs), rounds + 1
        outcomes = [answer(quality, i, j, chance, **dials) for i, j in pairs]
    best, worst = quality[scores.argmax()], quality[scores.argmin()]
    regret = quality.max() - best + worst - quality.min()
    return questions, rounds, best == quality.max(), worst == quality.min(), regret


def simulate(pools: int = 400) -> list[tuple]:
    """A row of HEAD for each K, judge and schedule, the means over the pools."""
    rows = []
    for k, names in SCHEDULES.items():
        qualities = [true_qualities(seed, k) for seed in range(pools)]
        for judge, dials in JUDGES.items():
            for name in names:
                played = [play(name, q, seed, dials) for seed, q in enumerate(qualities)]
                rows.append((k, judge, str(name), *np.mean(played, axis=0)))
    return rows


def panel(ax, k: int, judge: str, rows: list[tuple]):
    """The quality lost against the questions, a curve a family of schedules."""
    for family, style in (("R", "o-"), ("race", "s-"), ("pivot", "x"), ("all", "*")):
        points = sorted(
            (questions, lost)
            for K, who, name, questions, *_, lost in rows
            if (K, who) == (k, judge) and family == ("R" if name.isdigit() else name.split(":")[0])
        )
        ax.plot(*zip(*points, strict=True), style, label=family, markersize=8)
    ax.set_title(f"K = {k}, {judge}", fontsize=10)
    ax.axvline(k * (k - 1) / 8, color="grey", linestyle=":", linewidth=1)
    ax.set_xlabel("questions a prefix (dotted: a quarter of all pairs)", fontsize=8)
    ax.set_ylabel("true quality lost (best + worst)")
    ax.legend()


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = "where the quality lost against the questions is drawn (default: %(default)s)"
    flag.add_argument("picture", type=Path, nargs="?", default="out/comparisons.png", help=where)
    picture = flag.parse_args(arguments).picture
    picture.parent.mkdir(parents=True, exist_ok=True)
    rows = simulate()
    formats = ("", "", "", ".0f", ".0f", ".0%", ".0%", ".3f")
    print(
        markdown([HEAD, *([f"{v:{f}}" for v, f in zip(row, formats, strict=True)] for row in rows)])
    )
    panels = [partial(panel, k=k, judge=judge, rows=rows) for k in SCHEDULES for judge in JUDGES]
    print(figure_of(picture, panels, rows=len(SCHEDULES), sharey="row"))


if __name__ == "__main__":
    command.run(main)
