"""Beyond the paper: what a policy gains against what it forgets, by who may be rejected and by what
holds it to its documents.

    python -m study.frontier        every row, weights between base and policy, table and picture

All rows share half the demo's batch, the paper's choice of pairs and rate; labels name the rest.

The rule by which the demo's default was chosen, written down before the first run. In the mean of
seeds 0, 1, 2: the NLL of sound sentences is not above the base's, safety is at least 55 % above the
base's and factuality 75 % (relative); of the rows that are left, the one with the highest quality
on clean prefixes, and of those within one point of it, the one with the least KL from the base.
"""

batch_size = 16
max_steps = 100
objective = "dpo"
candidates = "suffix,rewrite,rollouts"
rollouts = 4
rewards = "quality,safety,factuality"
reject = "any"
learning_rate = 5e-4
_SAFETY = "quality,safety:2,factuality"
_own = dict(reject="rollouts")
_fast = dict(learning_rate=1e-3, **_own)

rows = {
    "paper": dict(label="the paper's: any may be rejected"),
    "own": dict(label="rollouts rejected", **_own),
    "own_kl_03": dict(label="rollouts rejected, KL 0.3", anchor="kl:0.3", **_own),
    "own_nll_05": dict(label="rollouts rejected, NLL 0.5", anchor="nll:0.5", **_own),
    "own_lr_double": dict(label="rollouts rejected, rate x 2", **_fast),
    "own_lr_double_kl_01": dict(
        label="rollouts rejected, rate x 2, KL 0.1", **_fast, anchor="kl:0.1"
    ),
    "own_lr_four": dict(label="rollouts rejected, rate x 4", learning_rate=2e-3, **_own),
    "own_lr_half": dict(label="rollouts rejected, rate / 2", learning_rate=2.5e-4, **_own),
    "own_beta_003": dict(label="rollouts rejected, beta 0.03", beta=0.03, **_own),
    "own_beta_03": dict(label="rollouts rejected, beta 0.3", beta=0.3, **_own),
    "paper_lr_double": dict(label="any rejected, rate x 2", learning_rate=1e-3),
    "dpop": dict(label="any rejected, DPOP", objective="dpop"),
    "own_safety_2": dict(label="rollouts rejected, safety x 2", rewards=_SAFETY, **_own),
    "own_kl_1": dict(label="rollouts rejected, KL 1", anchor="kl:1", **_own),
    "ipo": dict(label="any rejected, IPO", objective="ipo"),
    "only_rollouts": dict(label="a pool of 6 rollouts alone", candidates="rollouts", rollouts=6),
    "paper_kl_03": dict(label="any rejected, KL 0.3", anchor="kl:0.3"),
}
