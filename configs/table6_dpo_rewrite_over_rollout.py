"""Table 6, row 'DPO (chosen rewrite, rejected rollout)'. No judge: the first named wins."""

objective = "dpo"
candidates = "rewrite,rollouts"
rollouts = 1
rewards = ""
