"""Pivot against full comparison, quality, 8 rollouts. Full: rollouts_quality_8."""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality"
comparisons = "pivot"
dials = "share_unsafe=0"
