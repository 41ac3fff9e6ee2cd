"""Table 2 (from scratch), row 'RF-NLL suffix-vs-rewrite'."""

objective = "rf_nll"
candidates = "suffix,rewrite"
rewards = "quality,safety"
base_steps = 0
baseline = False
