"""Table 1, row 'self-improving, factuality'. Judge: a prompted 120B model."""

objective = "dpo"
candidates = "rollouts"
rollouts = 16
rewards = "quality,factuality"
dials = "share_unsafe=0"
