"""Fine-tuning a judge or a rewriter (paper, section 3) by the loop of train.py.

    python -m teachers.train judge --init_from=FOLDER --data=sets/quality.train.jsonl.zst \\
        --objective=grpo --candidates=rollouts                                  CPU, or one GPU
    torchrun --nproc_per_node=8 -m teachers.train rewriter configs/teachers.py:rewriter \\
        --init_from=FOLDER --judge_url=http://HOST:8000/v1 --judge_model=NAME    the paper's, 8 GPUs

In: rows of teachers/sets.py (data), the model to train (init_from), and for a rewriter the judge of
its rewrites. Out: a run folder like that of train.py, whose summary.json holds the greedy answers
to held-out rows. Keys: config.py.
"""

import contextlib
import dataclasses
import functools
from concurrent.futures import Future

import config as configuration
import train
from config import Config
from data import open_stream
from evaluation.results import table
from rewrite import Teachers
from support import command
from support.command import UserError
from support.distributed import rank
from support.settings import names
from teachers.tasks import KINDS, Rows, TaskStream, evaluate_answers, held_out_stream, score_answers
from tools.plot import plot_run
from world.corpus import parse_dials
from world.teacher import teacher_at


class Asked(Teachers):
    """The run's judge, which is asked about what a rewriter wrote."""

    def score(self, step: int, pool) -> Future:
        return score_answers(self.judge, pool.batch.rows, pool.texts, len(pool.sources))


def parse(arguments: list[str]) -> tuple[str, Config, bool]:
    """(judge or rewriter, the config of a run without a base of its own, whether it is resumed)"""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        configuration.parse(["--help"])  # ends the process
    teacher, *rest = arguments or [""]
    if teacher not in KINDS:
        raise UserError(f"{teacher!r}: say first which teacher is trained, {' or '.join(KINDS)}")
    config, resume = configuration.parse(rest)
    if config.data == "world":
        raise UserError("data: a teacher learns from rows that teachers/sets.py makes: name them")
    if "rewrite" in names(config.candidates):
        raise UserError("candidates: a teacher's are rollouts, or suffix (the rows' answers)")
    if config.dry_run or config.check:
        raise UserError("dry_run, check: train.py alone can say what a run will cost")
    return teacher, dataclasses.replace(config, base_steps=0, baseline=False), resume


def main(arguments: list[str]):
    teacher, config, resume = parse(arguments)
    summary, questions = {}, None
    with contextlib.ExitStack() as stack:
        device, tokenizer = stack.enter_context(train.opened(config, resume))
        rows = Rows(config.data, teacher)
        if config.eval_prefixes:  # before training, so that nothing fails after it
            questions = held_out_stream(config, teacher, tokenizer)
        asked = Asked(config, teacher_at("world", parse_dials(config.dials)), stack)
        how = dict(prompts=config.prompts, folder=config.init_from)
        how["supervised"] = "suffix" in names(config.candidates)
        batches = functools.partial(open_stream, rows, tokenizer, kind=TaskStream, **how)
        policies = train.train_phases(config, device, tokenizer, batches, asked)
        if rank() > 0:
            return
        if questions:
            summary = evaluate_answers(policies, questions, asked.judge, tokenizer, config)
            print(f"\n{table(summary)}\n")
        train.finish(config, summary, plot_run)


if __name__ == "__main__":
    command.run(main)
