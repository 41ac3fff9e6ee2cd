"""What `python -m study.real_text` trains: a judge on pairs of continuations, then a policy by it.

Texts are short, so that an update of 135M parameters takes seconds on a CPU: a prefix of at most 48
tokens, continuations of 24. An answer of the judge is a letter and eos.
"""

import pathlib

base_steps = 0
baseline = False
eval_prefixes = 0
warmup_steps = 10
prompts = str(pathlib.Path(__file__).parents[1] / "prompts" / "tiny")

rows = {
    "judge": dict(
        objective="nll",
        candidates="suffix",
        rewards="",
        chunk=2,
        max_seq=176,
        batch_size=16,
        max_steps=216,
        learning_rate=5e-5,
        eval_prefixes=100_000,
    ),
    "policy": dict(
        objective="dpo",
        candidates="suffix,rollouts",
        rollouts=4,
        reject="rollouts",
        rewards="quality",
        comparisons="pivot",
        judge_max_tokens=2,
        judge_temperature=0.6,
        judge_top_p=0.6,
        chunk=24,
        max_seq=72,
        batch_size=16,
        max_steps=40,
        learning_rate=5e-5,
    ),
}
