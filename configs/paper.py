"""The paper's scale for continued pretraining, named before a row's file.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/table6.py:dpo_suffix_pivot \\
        --data=DOCUMENTS --init_from=FOLDER --judge_url=URL --judge_model=NAME
"""

data = "data/slimpajama"
model = "llama-1.4b"
base_steps = 0
baseline = False
chunk = 128
max_seq = 2048
batch_size = 256
rollouts = 16
reject = "any"
max_steps = 2000
learning_rate = 5e-06
warmup_steps = 100
judge_temperature = 1.0
judge_top_p = 1.0
overlap = 0
concurrency = 1024
eval_prefixes = 1000
save_every = 50
micro_batch_tokens = 8192
