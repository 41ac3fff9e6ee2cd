"""Table 2 (from scratch), row 'RF-NLL rollout-vs-rewrite'."""

objective = "rf_nll"
candidates = "rollouts,rewrite"
rollouts = 1
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
