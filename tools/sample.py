"""Continuations of a text by one checkpoint, or by several side by side.

    python -m tools.sample CKPT "prefix"
    python -m tools.sample BASE CKPT "prefix" --n 3 --judge_url world

A checkpoint is any folder that model.py reads; all run on the CPU, by the sampler of training. With
a judge's URL ("world": the pocket world's own teacher) each continuation is called safe or not and
true or not, and each pair of checkpoints is compared, in both orders.
"""

import argparse
import contextlib
import itertools
import shutil
import textwrap

import torch

from config import Config
from judge import Judge
from model import load_model
from rollout import sample_rollouts
from support import command
from support.chat import Chat
from support.command import UserError
from support.tokenizer import load_tokenizer
from teachers.template import plain
from world.teacher import teacher_at


def continuations(folder: str, options) -> list[str]:
    """options.n continuations of the prefix by one checkpoint."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    ends = tokenizer.eos, *model.end_tokens
    prompt = plain(tokenizer, options.prefix)
    limit, N = model.config.max_seq, options.tokens
    if len(prompt) + N > limit:
        raise UserError(f"--tokens: {len(prompt)} of the prefix and {N} more exceed {limit}")
    prefix, pad = torch.tensor([prompt]), torch.zeros(1, dtype=torch.int32)  # [1, P], [1]
    how = dict(temperature=options.temperature, top_p=options.top_p, seed=options.seed, eos=ends)
    drawn = sample_rollouts(model, prefix, pad, options.n, N, index=torch.tensor([0]), **how)
    rows = zip(drawn.tokens[0].tolist(), drawn.lengths[0].tolist(), strict=True)
    return [tokenizer.decode([i for i in row[:length] if i not in ends]) for row, length in rows]


def show(labels: list[str], texts: list[str]):
    """One text as it is, several in a column each."""
    if len(texts) == 1:
        return print(visible(texts[0]) + "\n")
    width = shutil.get_terminal_size().columns // len(texts) - 3
    columns = [[label[-width:], "-" * width] for label in labels]
    columns = [c + textwrap.wrap(visible(t), width) for c, t in zip(columns, texts, strict=True)]
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        print("   ".join(cell.ljust(width) for cell in cells).rstrip())
    print()


def visible(text: str) -> str:
    """Without what a terminal would obey: control characters as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def give_verdicts(judge: Judge, labels: list[str], prefix: str, texts: list[str]):
    def ask(kind: str, **shown) -> str:
        return command.wait(judge.chat.run(judge.verdict(kind, **shown)))[0] or "no verdict"

    for label, text in zip(labels, texts, strict=True):
        truth = ask("factuality", prompt="factuality_noref_v1", prefix=prefix, text=text)
        print(f"{label}: {ask('safety', text=text)}, {truth}")
    for pair in itertools.combinations(zip(labels, texts, strict=True), 2):
        said = []
        for (label, a), (other, b) in (pair, pair[::-1]):  # both orders
            verdict = ask("quality", prefix=prefix, a=a, b=b)
            said.append({"A": label, "B": other}.get(verdict, verdict))
        print(f"better: {said[0]}" + ("" if said[0] == said[1] else f", other order: {said[1]}"))
    print()


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="CKPT", help="checkpoints, side by side")
    parser.add_argument("prefix", help="the text to continue")
    parser.add_argument("--n", type=int, default=1, help="continuations of each")
    parser.add_argument("--tokens", type=int, default=64, help="at most, of each continuation")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge_url", help="up to /v1, or 'world': add verdicts")
    parser.add_argument("--judge_model", default="judge", help="model name sent to judge_url")
    options = parser.parse_args(arguments)
    if min(options.n, options.tokens) < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("n and tokens from 1, temperature from 0, top_p above 0 and at most 1")
    by_folder = [continuations(folder, options) for folder in options.folders]
    with contextlib.ExitStack() as stack:
        judge = None
        if options.judge_url:
            teacher = teacher_at(options.judge_url)
            chat = stack.enter_context(Chat(teacher, options.judge_model, give_up_after=60.0))
            judge = Judge(chat, Config(seed=options.seed))
        for texts in zip(*by_folder, strict=True):
            show(options.folders, texts)
            if judge:
                give_verdicts(judge, options.folders, options.prefix, texts)


if __name__ == "__main__":
    command.run(main)
