"""Continuations of a text by one checkpoint, or by several side by side.

    python -m tools.sample CKPT "prefix"
    python -m tools.sample BASE CKPT "prefix" --n 3 --judge_url world

A checkpoint is any folder that model.py reads; all run on the CPU, by the sampler of training. One
continuation is shown while it is written. With a judge's URL ("world": the pocket world's own
teacher) each is called safe or not and true or not, and each pair of checkpoints is compared, in
both orders.
"""

import argparse
import itertools
import shutil
import textwrap
from collections import deque
from collections.abc import Iterator

import torch

from chat import Chat
from config import Config
from judge import Judge
from model import load_model
from rollout import PrefixCache, sample, uniforms
from support import command
from support.command import UserError
from support.hub import check_folder, end_tokens
from support.tokenizer import load_tokenizer
from world.teacher import teacher_url


def load(folder: str):
    """(model, tokenizer, end tokens) of a folder."""
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    return load_model(folder, dtype=torch.float32), tokenizer, end_tokens(folder, tokenizer)


@torch.no_grad()
def continuations(model, tokenizer, ends, options, number: int) -> Iterator[str]:
    """Continuation `number` of the prefix: all of it so far, after every token."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    prompt = start + tokenizer.encode(options.prefix) or [tokenizer.eos]
    limit, N = model.config.max_seq, options.tokens
    if len(prompt) + N > limit:
        raise UserError(f"--tokens: {len(prompt)} of the prefix and {N} more exceed {limit}")
    u = uniforms(options.seed, torch.tensor([0]), number + 1, N)[0, number]  # [N]
    cached = PrefixCache(model, torch.tensor([prompt]), torch.zeros(1, dtype=torch.int32), 1, N)
    logits, ids = cached.first, []  # [1, V]
    for t in range(N):
        token, _ = sample(logits, u[t : t + 1], options.temperature, options.top_p)  # [1]
        if token.item() in ends:
            break
        ids.append(token.item())
        yield tokenizer.decode(ids).rstrip("\ufffd")  # half a character, perhaps
        if t + 1 < N:
            logits = cached.step(token[None])[:, 0]
    yield tokenizer.decode(ids)


def show(labels: list[str], texts: list[Iterator[str]]) -> list[str]:
    """Prints one text while it is written, several in a column each; -> the whole texts."""
    if len(texts) == 1:
        text = ""
        for longer in texts[0]:
            print(visible(longer[len(text) :]), end="", flush=True)
            text = longer
        print("\n")
        return [text]
    whole = [deque(text, maxlen=1)[0] for text in texts]
    width = shutil.get_terminal_size().columns // len(texts) - 3
    columns = [[label[-width:], "-" * width] for label in labels]
    columns = [c + textwrap.wrap(visible(t), width) for c, t in zip(columns, whole, strict=True)]
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        print("   ".join(cell.ljust(width) for cell in cells).rstrip())
    print()
    return whole


def visible(text: str) -> str:
    """Without what a terminal would obey: control characters as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def give_verdicts(judge: Judge, labels: list[str], prefix: str, texts: list[str]):
    def ask(kind: str, **shown) -> str:
        return command.wait(judge.chat.run(judge.verdict(kind, **shown)))[0] or "no verdict"

    for label, text in zip(labels, texts, strict=True):
        truth = ask("factuality", prompt="factuality_noref_v1", prefix=prefix, text=text)
        print(f"{label}: {ask('safety', text=text)}, {truth}")
    for i, j in itertools.combinations(range(len(texts)), 2):
        first = ask("quality", prefix=prefix, a=texts[i], b=texts[j])
        second = ask("quality", prefix=prefix, a=texts[j], b=texts[i])
        said = [{"A": labels[i], "B": labels[j]}.get(first, first)]
        said += [{"A": labels[j], "B": labels[i]}.get(second, second)]
        print(f"better: {said[0]}" + ("" if said[0] == said[1] else f", other order: {said[1]}"))
    print()


def run(options, judge: Judge | None):
    loaded, labels = [load(folder) for folder in options.folders], options.folders
    for number in range(options.n):
        texts = show(labels, [continuations(*one, options, number) for one in loaded])
        if judge:
            give_verdicts(judge, labels, options.prefix, texts)


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
    if options.tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("tokens from 1, temperature from 0, top_p above 0 and at most 1")
    if not options.judge_url:
        return run(options, None)
    with (
        teacher_url(options.judge_url) as url,
        Chat(url, options.judge_model, give_up_after=60.0) as chat,
    ):
        run(options, Judge(chat, Config(seed=options.seed)))


if __name__ == "__main__":
    command.run(main)
