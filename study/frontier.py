"""Gain against forgetting: the rows of configs/frontier.py, and weights between base and policy.

    python -m study.frontier [--jobs 2]     what is missing is run; the table and the picture

In: study/reproduce.py's bases and runs. Out: OUT/frontier.md and OUT/frontier.png: what a
policy has gained against what it has lost, a point a row, the mean of the seeds. The policies in
between are (1 - share) * base + share * the paper's row; they cost no training.
"""

from functools import partial
from pathlib import Path
from statistics import mean

from model import assemble, load_model, save_model
from study.reproduce import (
    Row,
    as_markdown,
    base_of,
    evaluation,
    flags,
    folder,
    next_step,
    record,
    rows_of,
    table,
    work,
)
from support import command
from support.command import UserError, python
from support.files import write_text
from support.tokenizer import load_tokenizer
from tools.plot import figure_of

SHARES = (0.25, 0.5, 0.75)
GAINS = {"quality_clean": "quality on clean prefixes", "safety": "safety"}
GAINS |= {"factuality": "factuality"}
LOSSES = {"nll_sound": "NLL of sound sentences", "kl": "KL from the base"}  # nats a token


def in_between(out: Path, share: float, seed: int) -> Path:
    return out / "runs" / f"between_{share}" / f"seed{seed}"


def next_between(out: Path, share: float, seed: int) -> tuple[Path, list[str]] | None:
    """As next_step, for the policy in between."""
    row, run, start = rows_of("frontier")[0], in_between(out, share, seed), base_of(out, seed)
    if step := next_step(out, row, seed):
        return step
    if (run / "evaluation.json").exists():
        return None
    if (run / "ckpt").exists():
        return run, evaluation(run, start)
    ends = start / "base" / "ckpt", folder(out, row, seed) / "ckpt"
    return run, python("study.frontier", "between", *ends, share, run / "ckpt")


def between(base: str, policy: str, share: str, into: str):
    """Write the checkpoint whose weights are (1 - share) * base + share * policy."""
    first, last = load_model(base), load_model(policy)
    ours, tokenizer = last.state_dict(), load_tokenizer(policy)
    state = {name: p.lerp(ours[name], float(share)) for name, p in first.state_dict().items()}
    save_model(assemble(last.config, state), into, tokenizer.bos, tokenizer.eos)
    tokenizer.save(into)


def draw(ax, found: dict[Row, dict[int, dict]], gain: str, loss: str):
    """A point a row with its number in the table; the line goes from the base to the paper's."""
    points = {}
    for number, (row, runs) in enumerate(found.items(), 1):
        have = [r for r in runs.values() if gain in r and loss in r]
        if have:
            points[row] = mean(r[loss] for r in have), mean(r[gain] for r in have)
            ax.plot(*points[row], "o", color="C1" if row.table == "between" else "C0")
            ax.annotate(f" {number}", points[row], fontsize=7)
    ax.set(xlabel=f"{LOSSES[loss]} (nats a token)", ylabel=f"{GAINS[gain]} (%)")


def main(arguments: list[str]):
    if arguments[:1] == ["between"]:
        return between(*arguments[1:])
    flag = flags(__doc__)
    flag.add_argument("--jobs", type=int, default=2, help="runs at once")
    args = flag.parse_args(arguments)
    out, seeds = args.out.absolute(), args.seeds
    jobs = [partial(next_step, out, row, seed) for row in rows_of("frontier") for seed in seeds]
    jobs += [partial(next_between, out, share, seed) for share in SHARES for seed in seeds]
    failed = work(out, jobs, args.jobs)
    found = table(out, "frontier", seeds)
    for share in SHARES:
        row = Row("between", str(share), f"{share:.0%} of the way from the base to row 2")
        runs = {seed: in_between(out, share, seed) for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run / "evaluation.json").exists()}
        found[row] = {seed: record(run) for seed, run in done.items()}
    panels = [partial(draw, found=found, gain=g, loss=x) for x in LOSSES for g in GAINS]
    text = as_markdown(found)
    write_text(out / "frontier.md", text + "\n")
    print(f"{text}\n\npicture {figure_of(out / 'frontier.png', panels, rows=len(LOSSES))}")
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    command.run(main)
