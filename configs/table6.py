"""Table 6: objectives and pools of candidates, continued pretraining for safety.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/table6.py:dpo_suffix_pivot ...
    python -m study.reproduce table6       all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
Without rewards there is no judge, and the candidate that is named first wins.
"""

data = "data/redpajama_unsafe"
dials = "share_unsafe=1"  # the pocket world's stand-in for it
_judged = dict(rewards="quality,safety", judge_samples=5, judge_top_p=0.6)  # a fine-tuned 8B model

rows = {
    "sft_rewrite": dict(
        label="SFT (rewrite)",
        paper=(52.7, 50.6, None, None, 86.5),
        objective="nll",
        candidates="rewrite",
        rewards="",
    ),
    "sft_rollout": dict(
        label="SFT (1 rollout)",
        paper=(2.0, 0.2, None, None, 99.5),
        objective="nll",
        candidates="rollouts",
        rollouts=1,
        rewards="",
    ),
    "dpo_rewrite_over_rollout": dict(
        label="DPO (rewrite over rollout; no judge)",
        paper=(53.6, 83.1, None, None, 77.7),
        objective="dpo",
        candidates="rewrite,rollouts",
        rollouts=1,
        rewards="",
    ),
    "rf_nll_rollout_rewrite": dict(
        label="RF-NLL (rollout, rewrite)",
        paper=(49.0, 51.8, None, None, 85.0),
        objective="rf_nll",
        candidates="rollouts,rewrite",
        rollouts=1,
        **_judged,
    ),
    "rf_nll_suffix_rewrite_rollout": dict(
        label="RF-NLL (suffix, rewrite, 1 rollout)",
        paper=(50.1, 51.1, None, None, 84.6),
        objective="rf_nll",
        candidates="suffix,rewrite,rollouts",
        rollouts=1,
        **_judged,
    ),
    "dpo_suffix_rollout": dict(
        label="DPO (suffix, 1 rollout)",
        paper=(55.7, 84.7, None, None, 82.5),
        objective="dpo",
        candidates="suffix,rollouts",
        rollouts=1,
        **_judged,
    ),
    "dpo_rewrite_rollout": dict(
        label="DPO (rewrite, 1 rollout)",
        paper=(60.2, 87.2, None, None, 81.9),
        objective="dpo",
        candidates="rewrite,rollouts",
        rollouts=1,
        **_judged,
    ),
    "dpo_suffix_16_rollouts": dict(
        label="DPO (suffix, 16 rollouts)",
        paper=(73.6, 77.7, None, None, 91.1),
        objective="dpo",
        candidates="suffix,rollouts",
        rollouts=16,
        **_judged,
    ),
    "dpo_suffix_rewrite_16_rollouts": dict(
        label="DPO (suffix, rewrite, 16 rollouts)",
        paper=(72.5, 75.4, None, None, 88.9),
        objective="dpo",
        candidates="suffix,rewrite,rollouts",
        rollouts=16,
        **_judged,
    ),
    "dpo_suffix_pivot": dict(
        label="DPO (suffix as pivot, 16 rollouts)",
        paper=(59.6, 51.9, None, None, 89.0),
        objective="dpo",
        candidates="suffix,rollouts",
        rollouts=16,
        comparisons="pivot",
        **_judged,
    ),
    "dpo_16_rollouts": dict(
        label="DPO (16 rollouts)",
        paper=(71.1, 72.0, None, None, 88.9),
        objective="dpo",
        candidates="rollouts",
        rollouts=16,
        **_judged,
    ),
}
