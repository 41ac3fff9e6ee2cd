"""Number of rollouts, quality: K = 4. K = 16 is table1_quality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 4
rewards = "quality"
dials = "share_unsafe=0"
