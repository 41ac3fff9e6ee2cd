"""Fine-tuning a judge or a rewriter (paper, section 3) by the loop of train.py.

    python -m teachers.train judge --data=sets/quality.train.jsonl.zst --init_from=FOLDER \\
        --objective=grpo --candidates=rollouts                              a laptop, one GPU
    torchrun --nproc_per_node=8 -m teachers.train rewriter configs/teachers.py:rewriter \\
        --init_from=FOLDER --judge_url=http://HOST:8000/v1 --judge_model=NAME    the paper's, 8 GPUs

In: rows of teachers/sets.py (data), the model to train (init_from), and for a rewriter the judge of
its rewrites. Out: a run folder like that of train.py, whose summary.json holds the answers to the
held-out rows. Keys: config.py.
"""


import config as configuration
from config import Config, names
from support.command import UserError
from teachers.tasks import KINDS


def parse(arguments: list[str]) -> tuple[str, Config, bool]:
    """-> (judge or rewriter, config, whether a run is resumed)"""
    if "--help" not in arguments and "-h" not in arguments and arguments[:1] not in map(list, KINDS):
        raise UserError(f"which teacher: {' or '.join(KINDS)}? Say so before everything else")
    config, resume = configuration.parse(arguments[1:])
    if config.data == "world":
        raise UserError("data: a teacher learns from rows that teachers/sets.py makes: name files")
    if "rewrite" in names(config.candidates):
        raise UserError(
            "candidates: a teacher's are rollouts, or suffix (the rows' answers), not rewrite"
        )
    if config.dry_run:
        raise UserError("dry_run: train.py alone says what a run will cost")
    return arguments[0], config, resume
