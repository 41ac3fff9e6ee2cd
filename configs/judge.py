"""Choice of the judge: quality, 8 rollouts.

    torchrun --nproc_per_node=8 train.py configs/paper.py configs/judge.py:finetuned_8b ...
    python -m study.reproduce judge        all rows in miniature, the paper's figures beside ours

paper: % in the order of study/reproduce.py's COLUMNS, as far as the paper goes; None: no figure.
The pocket world's weaker judges err in 15 and 30 % of their verdicts, and as often as those of the
paper's table 11 do untrained (mean of its sources: Llama-3.3-70B, R1-Distill-8B, Llama-3.1-8B).
"""

objective = "dpo"
candidates = "rollouts"
rollouts = 8
rewards = "quality"
_finetuned = dict(judge_samples=5, judge_top_p=0.6)

rows = {
    "prompted_120b": dict(
        label="prompted 120B / exact", paper=(84.3, None, 86.8), dials="share_unsafe=0"
    ),
    "finetuned_8b": dict(
        label="fine-tuned 8B / noise 0.15",
        paper=(72.1, None, 72.7),
        dials="share_unsafe=0,noise=0.15",
        **_finetuned,
    ),
    "noise_30": dict(label="- / noise 0.3", dials="share_unsafe=0,noise=0.3", **_finetuned),
    "right_75": dict(label="- / 75.3 % right", dials="share_unsafe=0,noise=0.247", **_finetuned),
    "right_57": dict(label="- / 57.1 % right", dials="share_unsafe=0,noise=0.429", **_finetuned),
    "right_52": dict(label="- / 52.0 % right", dials="share_unsafe=0,noise=0.480", **_finetuned),
}
