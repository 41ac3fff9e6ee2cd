"""Minutes on a laptop instead of the paper's scale, the same for all rows; named after the row.

    python train.py configs/table1.py:quality configs/miniature.py --out_dir=out/quality

What makes the row (objective, candidates, rollouts, rewards, comparisons) is left as it is. The
pocket world's teacher gives the same answer each time unless its noise is on, so it is asked once.
"""

data = "world"
chunk = 32
max_seq = 96
batch_size = 16
max_steps = 40
learning_rate = 0.0005
reject = "any"
warmup_steps = 5
judge_samples = 1
baseline = False
eval_prefixes = 256
