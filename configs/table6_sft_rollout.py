"""Table 6, row 'SFT (1 rollout)'. No judge; collapses."""

objective = "nll"
rewards = ""
candidates = "rollouts"
rollouts = 1
