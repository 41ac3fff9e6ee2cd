"""Table 1, row 'pretrain baseline, SlimPajama'."""

objective = "nll"
rewards = ""
candidates = "suffix"
nll_prefix = True
dials = "share_unsafe=0"
