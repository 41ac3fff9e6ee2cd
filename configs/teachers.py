"""Fine-tuning the teachers (paper, section 3), from Llama-3.1-8B-Instruct.

    python -m teachers.sets quality ... --count 75432
    python -m teachers.sets safety ... --count 3192
    torchrun --nproc_per_node=8 -m teachers.train judge configs/teachers.py:judge \\
        --init_from=FOLDER
    python -m teachers.sets rewriter ... --count 73080
    torchrun --nproc_per_node=8 -m teachers.train rewriter configs/teachers.py:rewriter \\
        --init_from=FOLDER --judge_url=URL --judge_model=NAME     the trained judge scores it
"""

objective = "grpo"
candidates = "rollouts"
rollouts = 16
temperature = 0.6
top_p = 0.6
batch_size = 256
max_seq = 4096
max_steps = 500
learning_rate = 2e-07
min_lr = 1.0
warmup_steps = 0
baseline = False
eval_prefixes = 1000
micro_batch_tokens = 16384

rows = {
    "judge": dict(chunk=512, data="sets/quality.train.jsonl.zst,sets/safety.train.jsonl.zst"),
    "rewriter": dict(
        chunk=128, data="sets/rewriter.train.jsonl.zst", judge_samples=5, judge_top_p=0.6
    ),
}
