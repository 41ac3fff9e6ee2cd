"""Number of rollouts, quality: K = 2. K = 16 is table1_quality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 2
rewards = "quality"
dials = "share_unsafe=0"
