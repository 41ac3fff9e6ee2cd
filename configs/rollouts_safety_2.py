"""Number of rollouts, safety: K = 2. K = 1 and 16 are rows of table 6."""

objective = "dpo"
candidates = "suffix,rollouts"
rollouts = 2
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
