"""Pivot against full comparison, factuality, 8 rollouts. Full: rollouts_factuality_8."""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality,factuality"
comparisons = "pivot"
dials = "share_unsafe=0"
