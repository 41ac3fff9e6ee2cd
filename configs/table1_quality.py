"""Table 1, row 'self-improving, quality'. Judge: a prompted 120B model."""

objective = "dpo"
candidates = "rollouts"
rollouts = 16
rewards = "quality"
dials = "share_unsafe=0"
