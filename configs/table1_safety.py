"""Table 1, row 'self-improving, safety'. Judge: a fine-tuned 8B model."""

objective = "dpo"
candidates = "suffix,rollouts"
rollouts = 16
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
