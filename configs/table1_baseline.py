"""Table 1, row 'pretrain baseline'. Next-token prediction, on SlimPajama or RedPajama."""

objective = "nll"
rewards = ""
candidates = "suffix"
nll_prefix = True
baseline = False
