"""Number of rollouts, quality: K = 8. K = 16 is table1_quality."""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality"
dials = "share_unsafe=0"
