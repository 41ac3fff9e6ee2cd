"""Continuations of a text by one checkpoint, or by several side by side, as they are written.

    python sample.py CKPT "prefix"
    python sample.py BASE CKPT "prefix" --n 3 --judge_url world

A checkpoint is any folder that model.py reads; all run on the CPU. With a judge's URL ("world": the
pocket world's own teacher) each continuation is called safe or not and true or not, and each pair
of checkpoints is compared, in both orders.
"""

import argparse
import contextlib
import itertools
import shutil
import sys
import textwrap

import torch

from chat import Chat, TeacherGone
from judge import Judge
from rollout import uniforms
from support.command import UserError
from teachers.engine import Engine, Row, certain, load_engine, plain
from world.teacher import start_teacher


def write(engines: list[Engine], rows: list[Row]):
    """Yields every row's certain text, after each token of all, until all are written."""
    for engine, row in zip(engines, rows, strict=True):
        engine.waiting.append(row)
    while not all(row.finish for row in rows):
        for engine in engines:
            if engine.load:
                engine.step()
        yield [
            certain(engine.decode(row.ids), (), row.finish is not None)
            for engine, row in zip(engines, rows, strict=True)
        ]


def show(engines: list[Engine], rows: list[Row]) -> list[str]:
    """Prints the texts while they are written, in a column each; -> the texts."""
    if len(rows) == 1:
        shown = 0
        for [text] in write(engines, rows):
            print(visible(text[shown:]), end="", flush=True)
            shown = len(text)
        print("\n")
        return [text]
    width = shutil.get_terminal_size().columns // len(rows)
    shown = 0
    for texts in write(engines, rows):
        columns = [textwrap.wrap(visible(text).lstrip(), width - 3) for text in texts]
        # a line is printed once no column can change it any more
        whole = [len(c) if row.finish else len(c) - 1 for c, row in zip(columns, rows, strict=True)]
        unfinished = [n for n, row in zip(whole, rows, strict=True) if not row.finish]
        ready = min(unfinished) if unfinished else max(whole)
        for i in range(shown, ready):
            print_line([c[i] if i < len(c) else "" for c in columns], width)
        shown = max(shown, ready)
    print()
    return texts


def visible(text: str) -> str:
    """Without what a terminal would obey: control characters as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def print_line(cells: list[str], width: int):
    print("".join(cell.ljust(width) for cell in cells).rstrip(), flush=True)


def ask(judge: Judge, kind: str, **texts) -> str:
    return judge.chat.run(judge.verdict(kind, **texts)).result()[0] or "no verdict"


def give_verdicts(judge: Judge, labels: list[str], prefix: str, texts: list[str]):
    for label, text in zip(labels, texts, strict=True):
        safety = ask(judge, "safety", text=text)
        truth = ask(judge, "factuality", prompt="factuality_noref_v1", prefix=prefix, text=text)
        print(f"{label}: {safety}, {truth}")
    for i, j in itertools.combinations(range(len(texts)), 2):
        first = ask(judge, "quality", prefix=prefix, a=texts[i], b=texts[j])
        second = ask(judge, "quality", prefix=prefix, a=texts[j], b=texts[i])
        better = [{"A": i, "B": j}.get(first), {"A": j, "B": i}.get(second)]
        said = ["no verdict" if winner is None else labels[winner] for winner in better]
        print(f"better: {said[0]}" + ("" if said[0] == said[1] else f", other order: {said[1]}"))
    print()


def sample(options, judge: Judge | None):
    loaded = [load_engine(folder, 1) for folder in options.folders]
    labels = options.folders
    for k in range(options.n):
        rows = []
        for engine, tokenizer in loaded:
            prompt, limit = plain(tokenizer, options.prefix), engine.model.config.max_seq
            if len(prompt) + options.tokens > limit:
                raise ValueError(f"{len(prompt)} + {options.tokens} tokens exceed {limit}")
            u = uniforms(options.seed, torch.tensor([0]), k + 1, options.tokens)[0, k].numpy()
            rows.append(Row(tuple(prompt), u, options.temperature, options.top_p))
        if len(labels) > 1:
            width = shutil.get_terminal_size().columns // len(labels)
            print_line([label[-(width - 3) :] for label in labels], width)
            print_line(["-" * (width - 3)] * len(labels), width)
        texts = show([engine for engine, _ in loaded], rows)
        if judge:
            give_verdicts(judge, labels, options.prefix, texts)


def main():
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
    options = parser.parse_args()
    if options.tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("tokens from 1, temperature from 0, top_p above 0 and at most 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # no text of a model may end it
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        judge = None
        if url := options.judge_url:
            url = stack.enter_context(start_teacher()) if url == "world" else url
            chat = Chat(url, options.judge_model, give_up_after=60.0)
            stack.callback(chat.close)
            judge = Judge(chat, seed=options.seed)
        try:
            sample(options, judge)
        except (ValueError, UserError, TeacherGone) as error:
            sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    main()
