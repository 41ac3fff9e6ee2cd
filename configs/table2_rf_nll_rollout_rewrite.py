"""Table 2 (from scratch), row 'RF-NLL rollout-vs-rewrite'."""

objective = "rf_nll"
candidates = "rollouts,rewrite"
rollouts = 1
rewards = "quality,safety"
base_steps = 0
baseline = False
