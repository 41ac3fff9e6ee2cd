"""The judge's fine-tuning (paper, section 3), from Llama-3.1-8B-Instruct.

python rewrite.py quality ... --count 75432; python rewrite.py safety ... --count 3192
torchrun --nproc_per_node=8 train.py configs/teacher_judge.py --init_from=FOLDER \\
    --data=sets/quality.train.jsonl.zst,sets/safety.train.jsonl.zst
"""

task = "judge"
data = "sets/quality.train.jsonl.zst,sets/safety.train.jsonl.zst"
objective = "grpo"
candidates = "rollouts"
rollouts = 16
temperature = 0.6
top_p = 0.6
batch_size = 256
chunk = 512
max_seq = 4096
max_steps = 500
learning_rate = 2e-07
min_lr = 1.0
warmup_steps = 0
baseline = False
eval_prefixes = 1000
micro_batch_tokens = 16384
