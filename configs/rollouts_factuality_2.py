"""Number of rollouts, factuality: K = 2. K = 16 is table1_factuality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 2
rewards = "quality,factuality"
dials = "share_unsafe=0"
