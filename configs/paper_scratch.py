"""The paper's scale from scratch, named before a row of table 2.

    torchrun --nproc_per_node=8 train.py configs/paper_scratch.py configs/table2.py:nll_rewrite \\
        --data=DOCUMENTS --tokenizer=FOLDER --rewrite_url=URL --judge_url=URL
"""

data = "data/redpajama"
model = "llama-1.4b"
base_steps = 0
baseline = False
chunk = 128
max_seq = 2048
batch_size = 256
max_steps = 21000
learning_rate = 0.0005
reject = "any"
warmup_steps = 2000
concurrency = 1024
eval_prefixes = 1000
save_every = 250
micro_batch_tokens = 8192
