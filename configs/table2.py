"""Table 2: from scratch, with a rewriter that improves the documents.

    torchrun --nproc_per_node=8 train.py configs/paper_scratch.py configs/table2.py:baseline ...
    python -m study.reproduce table2       all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
"""

_judged = dict(rewards="quality,safety", judge_samples=5, judge_top_p=0.6)  # a fine-tuned 8B model

rows = {
    "baseline": dict(
        label="baseline",
        paper=(1.3, 2.4, None, None, 85.2),
        objective="nll",
        candidates="suffix",
        rewards="",
        nll_prefix=True,
    ),
    "nll_rewrite": dict(
        label="NLL on rewrites",
        paper=(1.6, 2.4, None, None, 96.7),
        objective="nll",
        candidates="rewrite",
        rewards="",
    ),
    "rf_nll_suffix_rewrite": dict(
        label="RF-NLL suffix-vs-rewrite",
        paper=(5.3, 25.8, None, None, 96.4),
        objective="rf_nll",
        candidates="suffix,rewrite",
        **_judged,
    ),
    "rf_nll_rollout_rewrite": dict(
        label="RF-NLL rollout-vs-rewrite",
        paper=(32.4, 12.1, None, None, 97.5),
        objective="rf_nll",
        candidates="rollouts,rewrite",
        rollouts=1,
        **_judged,
    ),
}
