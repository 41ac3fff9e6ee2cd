"""Comparing all pairs of 8 rollouts, or each with a pivot.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/pivot.py:quality_pivot ...
    python -m study.reproduce pivot        all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
"""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
dials = "share_unsafe=0"

rows = {
    "quality_all": dict(label="quality, all pairs", paper=(84.3,), rewards="quality"),
    "quality_pivot": dict(
        label="quality, pivot", paper=(72.1,), rewards="quality", comparisons="pivot"
    ),
    "factuality_all": dict(
        label="factuality, all pairs", paper=(83.1, None, None, 56.9), rewards="quality,factuality"
    ),
    "factuality_pivot": dict(
        label="factuality, pivot",
        paper=(64.2, None, None, 55.7),
        rewards="quality,factuality",
        comparisons="pivot",
    ),
}
