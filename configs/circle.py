"""The stages of `python -m teachers.circle` that train something, in their order.

An answer of the judge is a word, that of the rewriter a passage of 32; both end by eos. A higher
rate in a cold start would teach the form sooner, and destroy what the lessons have taught. The
policy reads prefixes of 32 tokens, so that the judge's prompts stay short.
"""

import pathlib

baseline = False
base_steps = 0
_prompts = pathlib.Path(__file__).parents[1] / "prompts"
prompts = str(_prompts / "tiny")  # letters and line ends: a small model reads few tokens

_supervised = dict(objective="nll", candidates="suffix", rewards="", eval_prefixes=0)
_next_token = _supervised | dict(
    nll_prefix=True, chunk=32, batch_size=32, learning_rate=3e-3, warmup_steps=30
)
_grpo = dict(objective="grpo", candidates="rollouts", save_every=100, eval_prefixes=1000)
_judge = dict(chunk=2, max_seq=160, batch_size=32)
_rewriter = dict(chunk=36, max_seq=160, batch_size=16)
_served = dict(judge_temperature=0.6, judge_top_p=0.6)  # by the judge above
_world = dict(dials="people=6", max_seq=64)

rows = {
    "base": _next_token | dict(max_seq=96, max_steps=800, model="world-teacher"),
    "start": _next_token | _world | dict(max_steps=600),
    "judge_cold": _supervised | _judge | dict(max_steps=160, learning_rate=5e-4),
    "judge": _grpo | _judge | dict(max_steps=600, rollouts=16, learning_rate=3e-4),
    "rewriter_cold": _supervised | _rewriter | dict(max_steps=800, learning_rate=3e-3),
    "rewriter": _grpo | _rewriter | _served | dict(max_steps=120, rollouts=8, learning_rate=5e-4),
    "policy": _world
    | _served
    | dict(rewards="quality,safety", batch_size=16, max_steps=100, eval_prefixes=0),
}
