"""Table 6, row 'SFT (rewrite)'. No judge."""

objective = "nll"
rewards = ""
candidates = "rewrite"
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
