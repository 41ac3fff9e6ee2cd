"""Beyond the paper: table 6's pairs if only rollouts may be rejected, and with an anchor beside.

    python -m study.reproduce table6 reject

Settings are table 6's, in miniature; rows of table 6 that are not here learn from rollouts alone or
from no pairs at all, so nothing changes for them.
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

rows = _pools | _held
