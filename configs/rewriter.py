"""Beyond the paper: rows of table 6 under the usual rewriter and a weak one.

    python -m study.reproduce rewriter

The weak one knows a quarter of the facts, not three; it leaves three faults of four, not one.
"""

data = "data/redpajama_unsafe"
_usual = dict(dials="share_unsafe=1")
_weak = dict(dials="share_unsafe=1,rewriter_knowledge=0.25,rewriter_flaws=0.75")
_judged = dict(rewards="quality,safety", judge_samples=5, judge_top_p=0.6)
_sft = dict(objective="nll", candidates="rewrite", rewards="")
_rf_nll = dict(objective="rf_nll", candidates="rollouts,rewrite", rollouts=1, **_judged)
_pair = dict(objective="dpo", candidates="rewrite,rollouts", rollouts=1)
_dpo, _over = _pair | _judged, _pair | dict(rewards="")

rows = {
    "usual_sft": dict(label="SFT (rewrite), usual rewriter", **_sft, **_usual),
    "usual_rf_nll": dict(label="RF-NLL (rollout, rewrite), usual rewriter", **_rf_nll, **_usual),
    "usual_dpo": dict(label="DPO (rewrite, 1 rollout), usual rewriter", **_dpo, **_usual),
    "weak_sft": dict(label="SFT (rewrite), weak rewriter", **_sft, **_weak),
    "weak_rf_nll": dict(label="RF-NLL (rollout, rewrite), weak rewriter", **_rf_nll, **_weak),
    "weak_dpo": dict(label="DPO (rewrite, 1 rollout), weak rewriter", **_dpo, **_weak),
    "weak_over": dict(label="DPO (rewrite over rollout), weak rewriter", **_over, **_weak),
}
