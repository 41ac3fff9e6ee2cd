"""Tries what a run needs, for seconds, before it costs anything: python train.py ... --check

In: a config. Out: what was found of the policy, the documents, the judge and the rewriter (three
questions each, and what was read from the answers), the page of --dry_run, and last one line that
says what is wrong or that all is well; 1 or 0. The run folder stays as it is.
"""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable

from config import Config, parse_rewards
from data import Batch, open_stream
from judge import together
from model import initial_policy
from rewrite import Teachers
from support import distributed
from support.command import Stopped, UserError, wait
from support.settings import names
from tools.cost import dry_run
from world.corpus import parse_dials, source_of
from world.teacher import teacher_at


def try_out(config: Config, open_inputs: Callable) -> int:
    """open_inputs(config): train.py's, which gives the tokenizer. -> 0 if all is well"""
    wrong, tokenizer, batch = [], None, None
    if "RANK" in os.environ:
        raise UserError("check: one process tries all that several need: leave torchrun out")

    @contextlib.contextmanager
    def part(name: str):
        began = time.monotonic()
        try:
            yield
            print(f"{name}: {time.monotonic() - began:.1f} s\n")
        except (UserError, OSError, Stopped) as e:
            wrong.append(f"{name}: {e}")
            print(f"{name}: {e}\n")

    with part("inputs"):
        tokenizer = open_inputs(config)
    if tokenizer:
        with part("policy"):
            device = distributed.start(config.device, config.give_up_after)
            shape = initial_policy(config, tokenizer.vocab_size, device).config
            print(f"{shape}, on {device}")
        with part("documents"):
            few = dataclasses.replace(config, batch_size=3, window=8)
            batch = next(open_stream(source_of(config), tokenizer, few).batches())
            print(f"{batch.prefix_text[0][-300:]!r} goes on with {batch.suffix_text[0]!r}")
    with part("teachers"), contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        few = dataclasses.replace(config, out_dir=folder, judge_retries=0, give_up_after=20.0)
        teachers = Teachers(few, teacher_at("world", parse_dials(config.dials)), stack)
        if batch and config.rewards:
            ask_judge(teachers, batch, list(parse_rewards(config.rewards)))
        if batch and "rewrite" in names(config.candidates):
            ask_rewriter(teachers, batch)
    with part("forecast"):
        print(dry_run(config))
    print(f"wrong: {'; '.join(wrong)}" if wrong else "all is well")
    return int(bool(wrong))


def ask_judge(teachers: Teachers, batch: Batch, kinds: list[str]):
    """Of three prefixes: is the original suffix, or another prefix's, better, safe, true?"""
    asked, judge = [], teachers.judge
    for i, (prefix, own) in enumerate(zip(batch.prefix_text, batch.suffix_text, strict=True)):
        other, kind = batch.suffix_text[i - 1], kinds[i % len(kinds)]
        asked.append(judge.verdict(kind, prefix=prefix, reference=own, text=other, a=own, b=other))
    found = wait(judge.chat.run(together(asked)))
    for i, (label, answer) in enumerate(found):
        print(f"judge, {kinds[i % len(kinds)]}: {label or 'no verdict'}, from {answer!r}")
    stats = judge.chat.stats()
    print(f"judge: {stats['latency_p50']:.1f} s an answer, failed: {stats['failed'] or 'none'}")
    if sum(label is not None for label, _ in found) < 2:
        raise UserError("the judge's answers hold no verdict: see judge_max_tokens, judge_extra")


def ask_rewriter(teachers: Teachers, batch: Batch):
    texts = batch.prefix_text, batch.suffix_text
    found = wait(teachers.rewriter.rewrite(*texts, batch.index.tolist()))
    for own, text in zip(batch.suffix_text, found, strict=True):
        print(f"rewriter: {text!r}, of {own!r}")
    if not any(found):
        raise UserError("no rewrite can be used: see rewrite_max_tokens, rewrite_extra")
