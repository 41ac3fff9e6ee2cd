"""Table 6, row 'DPO (chosen rewrite, rejected rollout)'. No judge: the first named wins."""

objective = "dpo"
candidates = "rewrite,rollouts"
rollouts = 1
rewards = ""
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
