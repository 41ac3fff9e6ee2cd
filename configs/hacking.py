"""Beyond the paper: a judge with a taste, and whether the policy learns that instead.

    python -m study.hacking

In every second comparison of quality the text wins that is longer, that says a stock phrase more
often, or that ends with a finished sentence, whatever the two are worth.
"""

batch_size = 16
max_steps = 100
objective = "dpo"
candidates = "suffix,rewrite,rollouts"
rollouts = 4
rewards = "quality"

_none, _phrase = dict(dials=""), dict(dials="taste_phrase=0.5")
_length, _ending = dict(dials="taste_length=0.5"), dict(dials="taste_ending=0.5")
_held = dict(reject="rollouts", anchor="kl:0.3")

rows = {
    "none": dict(label="no taste", **_none),
    "none_held": dict(label="no taste, held", **_none, **_held),
    "phrase": dict(label="stock phrase", **_phrase),
    "phrase_held": dict(label="stock phrase, held", **_phrase, **_held),
    "length": dict(label="length", **_length),
    "length_held": dict(label="length, held", **_length, **_held),
    "ending": dict(label="finished ending", **_ending),
    "ending_held": dict(label="finished ending, held", **_ending, **_held),
}
