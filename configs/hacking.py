"""Beyond the paper: a judge with a taste, and whether the policy learns that instead.

    python -m study.hacking

Whenever two texts differ in it, the one wins that says a stock phrase more often, that ends with a
finished sentence, or that is longer, whatever the two are worth. The rate is the demo's, the choice
of pairs the paper's.
"""

batch_size = 16
max_steps = 100
objective = "dpo"
candidates = "suffix,rewrite,rollouts"
rollouts = 4
rewards = "quality"
learning_rate = 1e-3
reject = "any"

_none, _phrase = dict(dials=""), dict(dials="taste_phrase=1")
_ending, _length = dict(dials="taste_ending=1"), dict(dials="taste_length=1")
_held = dict(anchor="kl:0.3")

rows = {
    "none": dict(label="no taste", **_none),
    "none_held": dict(label="no taste, anchor", **_none, **_held),
    "phrase": dict(label="stock phrase", **_phrase),
    "phrase_held": dict(label="stock phrase, anchor", **_phrase, **_held),
    "ending": dict(label="finished ending", **_ending),
    "ending_held": dict(label="finished ending, anchor", **_ending, **_held),
    "length": dict(label="length", **_length),
    "length_held": dict(label="length, anchor", **_length, **_held),
}
