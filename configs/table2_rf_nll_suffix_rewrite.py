"""Table 2 (from scratch), row 'RF-NLL suffix-vs-rewrite'."""

objective = "rf_nll"
candidates = "suffix,rewrite"
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
