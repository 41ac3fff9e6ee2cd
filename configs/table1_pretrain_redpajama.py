"""Table 1, row 'pretrain baseline, RedPajama' (filtered to unsafe documents)."""

objective = "nll"
rewards = ""
candidates = "suffix"
nll_prefix = True
data = "data/redpajama_unsafe"
dials = "share_unsafe=1"
