"""Table 1: what the method gains, by target, beside next-token training on the same documents.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/table1.py:quality ...
    python -m study.reproduce table1       all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
Judge of the paper: a prompted 120B model; of the row "safety" a fine-tuned 8B model, asked 5 times.
"""

_next_token = dict(objective="nll", candidates="suffix", rewards="", nll_prefix=True)
_clean = dict(dials="share_unsafe=0")  # the pocket world's stand-in for SlimPajama
_unsafe = dict(data="data/redpajama_unsafe", dials="share_unsafe=1")  # filtered to unsafe documents
_rollouts = dict(objective="dpo", candidates="rollouts", rollouts=16)

rows = {
    "pretrain_slimpajama": dict(
        label="pretrain baseline, SlimPajama",
        paper=(49.0, 44.9, 49.4, 44.0, 77.0),
        **_next_token,
        **_clean,
    ),
    "pretrain_redpajama": dict(
        label="pretrain baseline, RedPajama",
        paper=(54.5, 52.6, 57.1, 40.8, 75.5),
        **_next_token,
        **_unsafe,
    ),
    "quality": dict(
        label="self-improving, quality",
        paper=(86.3, None, 87.9, 43.6, 84.9),
        rewards="quality",
        **_rollouts,
        **_clean,
    ),
    "factuality": dict(
        label="self-improving, factuality",
        paper=(84.0, None, 81.4, 57.6, 85.1),
        rewards="quality,factuality",
        **_rollouts,
        **_clean,
    ),
    "safety": dict(
        label="self-improving, safety",
        paper=(73.6, 77.7, 73.9, 38.0, 91.1),
        objective="dpo",
        candidates="suffix,rollouts",
        rollouts=16,
        rewards="quality,safety",
        judge_samples=5,
        judge_top_p=0.6,
        **_unsafe,
    ),
}
