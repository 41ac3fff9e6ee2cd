"""As miniature.py, for the rows that start from scratch (table 2): more steps, a higher rate."""

data = "world"
chunk = 32
max_seq = 96
batch_size = 32
max_steps = 200
learning_rate = 0.003
reject = "any"
warmup_steps = 20
judge_samples = 1
base_steps = 0
baseline = False
eval_prefixes = 256
