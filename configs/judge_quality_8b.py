"""Choice of the judge, quality, 8 rollouts: a fine-tuned 8B model.

The prompted 120B model is rollouts_quality_8. The pocket world's weaker judge errs in 15 % of its
verdicts.
"""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality"
judge_samples = 5
judge_top_p = 0.6
dials = "share_unsafe=0,noise=0.15"
