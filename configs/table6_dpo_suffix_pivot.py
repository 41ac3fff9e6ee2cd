"""Table 6, row 'DPO (suffix as pivot, 16 rollouts)'."""

objective = "dpo"
candidates = "suffix,rollouts"
rollouts = 16
comparisons = "pivot"
rewards = "quality,safety"
judge_samples = 5
judge_top_p = 0.6
