"""Table 2 (from scratch), row 'NLL on rewrites'."""

objective = "nll"
rewards = ""
candidates = "rewrite"
