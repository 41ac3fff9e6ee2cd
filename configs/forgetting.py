"""Beyond the paper: does an NLL term on the chosen candidate keep what DPO forgets?

python -m study.reproduce forgetting
"""

objective = "dpo"
candidates = "rollouts"
rollouts = 4
rewards = "quality"
dials = "share_unsafe=0"

rows = {
    "weight_0": dict(label="nll_weight 0"),
    "weight_1": dict(label="nll_weight 1", nll_weight=1.0),
    "weight_4": dict(label="nll_weight 4", nll_weight=4.0),
}
