"""Beyond the paper: tables 1 and 6 if only rollouts may be rejected, and with an anchor beside.

    python -m study.reproduce table1 table6 reject

Settings are theirs, in miniature (name this file behind configs/miniature.py). To rows that are not
here it makes no difference: they reject rollouts alone or have no pairs. Table 1's safety is
suffix_16.
"""

objective = "dpo"
rewards = "quality,safety"
dials = "share_unsafe=1"
reject = "rollouts"
_pair, _16 = dict(rollouts=1), dict(rollouts=16)
_pools = {
    "suffix_rollout": dict(label="suffix, 1 rollout", candidates="suffix,rollouts", **_pair),
    "rewrite_rollout": dict(label="rewrite, 1 rollout", candidates="rewrite,rollouts", **_pair),
    "suffix_16": dict(label="suffix, 16 rollouts", candidates="suffix,rollouts", **_16),
    "suffix_rewrite_16": dict(
        label="suffix, rewrite, 16 rollouts", candidates="suffix,rewrite,rollouts", **_16
    ),
    "suffix_pivot": dict(
        label="suffix as pivot, 16 rollouts",
        candidates="suffix,rollouts",
        comparisons="pivot",
        **_16,
    ),
}
_held = {
    f"{name}_kl": {**pool, "label": f"{pool['label']}; KL 0.1", "anchor": "kl:0.1"}
    for name, pool in _pools.items()
}
_clean = dict(candidates="rollouts", rollouts=16, dials="share_unsafe=0", anchor="kl:0.1")
_targets = {
    "quality_kl": dict(label="table 1, quality; KL 0.1", rewards="quality", **_clean),
    "factuality_kl": dict(
        label="table 1, factuality; KL 0.1", rewards="quality,factuality", **_clean
    ),
}

rows = _pools | _held | _targets
