"""Beyond the paper: judging one or two batches late, while the next ones are rolled out.

python -m study.reproduce overlap
"""

objective = "dpo"
candidates = "rollouts"
rollouts = 4
rewards = "quality"
dials = "share_unsafe=0"

rows = {
    "overlap_0": dict(label="overlap 0"),
    "overlap_1": dict(label="overlap 1", overlap=1),
    "overlap_2": dict(label="overlap 2", overlap=2),
}
