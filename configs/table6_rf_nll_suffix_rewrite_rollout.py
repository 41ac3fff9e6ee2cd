"""Table 6, row 'RF-NLL (suffix, rewrite, 1 rollout)'."""

objective = "rf_nll"
candidates = "suffix,rewrite,rollouts"
rollouts = 1
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
