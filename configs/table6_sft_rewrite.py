"""Table 6, row 'SFT (rewrite)'. No judge."""

objective = "nll"
rewards = ""
candidates = "rewrite"
