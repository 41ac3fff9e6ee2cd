"""Beyond the paper: which pairs to ask about, under a judge that errs, on the world's own mix.

python -m study.reproduce schedules
"""

objective = "dpo"
candidates = "rollouts"
rewards = "quality"
dials = "noise=0.1"

rows = {
    "k8_all": dict(label="K = 8, all", rollouts=8, comparisons="all"),
    "k8_race": dict(label="K = 8, race", rollouts=8, comparisons="race"),
    "k8_pivot": dict(label="K = 8, pivot", rollouts=8, comparisons="pivot"),
    "k16_all": dict(label="K = 16, all", rollouts=16, comparisons="all"),
    "k16_race": dict(label="K = 16, race", rollouts=16, comparisons="race"),
    "k16_pivot": dict(label="K = 16, pivot", rollouts=16, comparisons="pivot"),
}
