"""Number of rollouts, factuality: K = 8. K = 16 is table1_factuality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality,factuality"
dials = "share_unsafe=0"
