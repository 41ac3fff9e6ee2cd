"""Number of rollouts, factuality: K = 4. K = 16 is table1_factuality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 4
rewards = "quality,factuality"
dials = "share_unsafe=0"
