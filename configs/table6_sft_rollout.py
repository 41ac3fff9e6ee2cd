"""Table 6, row 'SFT (1 rollout)'. No judge."""

objective = "nll"
rewards = ""
candidates = "rollouts"
rollouts = 1
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
