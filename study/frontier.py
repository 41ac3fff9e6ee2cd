"""Gain against forgetting: the rows of configs/frontier.py, and weights between base and policy.

    python -m study.frontier [--jobs 2]     what is missing is run; the table and the picture

In: study/reproduce.py's bases and runs. Out: OUT/frontier.md and OUT/frontier.png: what a
policy has gained against what it has lost, a point a row, the mean of the seeds. The policies in
between are (1 - share) * base + share * the paper's row; they cost no training.
"""

import dataclasses
from functools import partial
from pathlib import Path
from statistics import mean

from model import assemble, load_model, save_model
from study.reproduce import Row, as_markdown, flags, table, work_on
from support import command
from support.command import UserError
from support.files import write_text
from support.tokenizer import load_tokenizer
from tools.plot import figure_of

GAINS = {"quality_clean": "quality on clean prefixes", "safety": "safety"}
GAINS |= {"factuality": "factuality"}
LOSSES = {"nll_sound": "NLL of sound sentences", "kl": "KL from the base"}  # nats a token


def between(base: str, policy: str, share: str, into: str):
    """Write the checkpoint whose weights are (1 - share) * base + share * policy."""
    first, last = load_model(base), load_model(policy)
    ours, tokenizer = last.state_dict(), load_tokenizer(policy)
    state = {name: p.lerp(ours[name], float(share)) for name, p in first.state_dict().items()}
    begun = Path(f"{into}.begun")
    save_model(assemble(last.config, state), begun, tokenizer.bos, tokenizer.eos)
    tokenizer.save(begun)
    begun.rename(into)  # whole, or not there


def numbered(found: dict[Row, dict[int, dict]]) -> dict[Row, dict[int, dict]]:
    rows = enumerate(found.items(), 1)
    return {dataclasses.replace(row, label=f"{n}: {row.label}"): runs for n, (row, runs) in rows}


def draw(ax, found: dict[Row, dict[int, dict]], gain: str, loss: str):
    """A point a row with its number in the table; weights in between in another colour."""
    for number, (row, runs) in enumerate(found.items(), 1):
        have = [r for r in runs.values() if gain in r and loss in r]
        if have:
            point = mean(r[loss] for r in have), mean(r[gain] for r in have)
            ax.plot(*point, "o", color="C1" if row.table == "between" else "C0")
            ax.annotate(f" {number}", point, fontsize=7)
    ax.set(xlabel=f"{LOSSES[loss]} (nats a token)", ylabel=f"{GAINS[gain]} (%)")


def picture(path: Path, found: dict[Row, dict[int, dict]]) -> Path:
    panels = [partial(draw, found=found, gain=g, loss=x) for x in LOSSES for g in GAINS]
    return figure_of(path, panels, rows=len(LOSSES))


def main(arguments: list[str]):
    if arguments[:1] == ["between"]:
        return between(*arguments[1:])
    args = flags(__doc__).parse_args(arguments)
    failed = work_on(["frontier", "between"], args)
    found = table("frontier", args) | table("between", args)
    text = as_markdown(numbered(found))
    write_text(args.out / "frontier.md", text + "\n")
    print(f"{text}\n\npicture {picture(args.out / 'frontier.png', found)}")
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    command.run(main)
