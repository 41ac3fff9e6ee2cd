"""The rewriter's fine-tuning (paper, section 3), from Llama-3.1-8B-Instruct; the judge scores it.

python rewrite.py rewriter ... --count 73080
torchrun --nproc_per_node=8 train.py configs/teacher_rewriter.py --init_from=FOLDER \\
    --judge_url=URL --judge_model=NAME
"""

task = "rewriter"
data = "sets/rewriter.train.jsonl.zst"
objective = "grpo"
candidates = "rollouts"
rollouts = 16
temperature = 0.6
top_p = 0.6
batch_size = 256
chunk = 128
max_seq = 4096
max_steps = 500
learning_rate = 2e-07
min_lr = 1.0
warmup_steps = 0
baseline = False
eval_prefixes = 1000
judge_samples = 5
judge_top_p = 0.6
micro_batch_tokens = 16384
