"""Table 2 (from scratch), row 'baseline'."""

objective = "nll"
rewards = ""
candidates = "suffix"
nll_prefix = True
