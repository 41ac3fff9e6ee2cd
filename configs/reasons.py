"""Rows that test why a finding of the paper is not reproduced (study/findings.txt, "why").

    python -m study.reproduce reasons

Settings are those of tables 1 and 6 in miniature (name this file behind configs/miniature.py) but
for what the label names.
"""

_judged = dict(rewards="quality,safety", dials="share_unsafe=1", learning_rate=1.25e-4)

rows = {
    "next_token_own": dict(
        label="pretrain baseline, documents as the base's",
        objective="nll",
        candidates="suffix",
        rewards="",
        nll_prefix=True,
    ),
    "dpo_16_slow": dict(
        label="DPO (rewrite, 16 rollouts), a quarter of the rate",
        objective="dpo",
        candidates="rewrite,rollouts",
        rollouts=16,
        **_judged,
    ),
    "rf_nll_16_slow": dict(
        label="RF-NLL (16 rollouts, rewrite), a quarter of the rate",
        objective="rf_nll",
        candidates="rollouts,rewrite",
        rollouts=16,
        **_judged,
    ),
}
