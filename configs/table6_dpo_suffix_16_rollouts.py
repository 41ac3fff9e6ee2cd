"""Table 6, row 'DPO (suffix, 16 rollouts)'."""

objective = "dpo"
candidates = "suffix,rollouts"
rollouts = 16
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
