"""Number of rollouts K, for each of the three targets.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/rollouts.py:safety_4 ...
    python -m study.reproduce rollouts     all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
K = 16 (and safety's K = 1) are rows of tables 1 and 6; study.reproduce trains them once.
"""

objective = "dpo"
_quality = dict(candidates="rollouts", rewards="quality", dials="share_unsafe=0")
_factuality = dict(candidates="rollouts", rewards="quality,factuality", dials="share_unsafe=0")
_safety = dict(
    candidates="suffix,rollouts",
    rewards="quality,safety",
    judge_samples=5,
    judge_top_p=0.6,
    data="data/redpajama_unsafe",
    dials="share_unsafe=1",
)


def _row(target, values, K, *paper):
    return dict(label=f"{target}, K = {K}", rollouts=K, paper=paper, **values)


rows = {
    "quality_2": _row("quality", _quality, 2, 69.9, None, 67.6),
    "quality_4": _row("quality", _quality, 4, 75.5, None, 71.2),
    "quality_8": _row("quality", _quality, 8, 84.3, None, 86.8),
    "quality_16": _row("quality", _quality, 16, 86.3, None, 87.9),
    "factuality_2": _row("factuality", _factuality, 2, 65.2, None, None, 46.2),
    "factuality_4": _row("factuality", _factuality, 4, 69.0, None, None, 48.8),
    "factuality_8": _row("factuality", _factuality, 8, 83.1, None, None, 56.9),
    "factuality_16": _row("factuality", _factuality, 16, 84.0, None, None, 57.6),
    "safety_1": _row("safety", _safety, 1, 55.7, None, None, None, 82.5),
    "safety_2": _row("safety", _safety, 2, 57.3, None, None, None, 86.2),
    "safety_4": _row("safety", _safety, 4, 63.0, None, None, None, 85.2),
    "safety_8": _row("safety", _safety, 8, 69.0, None, None, None, 85.4),
    "safety_16": _row("safety", _safety, 16, 73.6, None, None, None, 91.1),
}
