"""The tables that reproduce.py runs: which config is which row, and the paper's figures for it.

A row is a file of configs/, sometimes with keys of our own changed. `paper` holds the published
figures in the order of COLUMNS. Tables without figures go beyond the paper.
"""

from dataclasses import dataclass, field

COLUMNS = {
    "quality_clean": "quality, clean",
    "quality_unsafe": "quality, unsafe",
    "coherence": "coherence",
    "factuality": "factuality",
    "safety": "safety",
    "nll": "held-out NLL",
}


@dataclass(frozen=True)
class Row:
    label: str
    config: str  # configs/NAME.py; "" is the base itself
    paper: tuple = ()  # in the order of COLUMNS, as far as the paper goes; None: no figure
    changes: dict = field(default_factory=dict)


def rollouts_rows(reward: str, largest: str, **paper) -> list[Row]:
    """The row of each number of rollouts; paper: K2=(...)."""
    files = {K: f"rollouts_{reward}_{K[1:]}" for K in paper} | {"K16": largest}
    files |= {"K1": "table6_dpo_suffix_rollout"}
    return [Row(f"{reward}, K = {K[1:]}", files[K], figures) for K, figures in paper.items()]


WEAK_REWRITER = "share_unsafe=1,rewriter_knowledge=0.25,rewriter_flaws=0.75"
TABLES = {
    "table1": [
        Row("base", "", (50.0, 50.0, 50.1, 42.3, 76.9)),
        Row(
            "pretrain baseline, SlimPajama",
            "table1_pretrain_slimpajama",
            (49.0, 44.9, 49.4, 44.0, 77.0),
        ),
        Row(
            "pretrain baseline, RedPajama",
            "table1_pretrain_redpajama",
            (54.5, 52.6, 57.1, 40.8, 75.5),
        ),
        Row("self-improving, quality", "table1_quality", (86.3, None, 87.9, 43.6, 84.9)),
        Row("self-improving, factuality", "table1_factuality", (84.0, None, 81.4, 57.6, 85.1)),
        Row("self-improving, safety", "table1_safety", (73.6, 77.7, 73.9, 38.0, 91.1)),
    ],
    "table2": [
        Row("baseline", "table2_baseline", (1.3, 2.4, None, None, 85.2)),
        Row("NLL on rewrites", "table2_nll_rewrite", (1.6, 2.4, None, None, 96.7)),
        Row(
            "RF-NLL suffix-vs-rewrite",
            "table2_rf_nll_suffix_rewrite",
            (5.3, 25.8, None, None, 96.4),
        ),
        Row(
            "RF-NLL rollout-vs-rewrite",
            "table2_rf_nll_rollout_rewrite",
            (32.4, 12.1, None, None, 97.5),
        ),
    ],
    "table6": [
        Row("SFT (rewrite)", "table6_sft_rewrite", (52.7, 50.6, None, None, 86.5)),
        Row("SFT (1 rollout)", "table6_sft_rollout", (2.0, 0.2, None, None, 99.5)),
        Row(
            "DPO (rewrite over rollout; no judge)",
            "table6_dpo_rewrite_over_rollout",
            (53.6, 83.1, None, None, 77.7),
        ),
        Row(
            "RF-NLL (rollout, rewrite)",
            "table6_rf_nll_rollout_rewrite",
            (49.0, 51.8, None, None, 85.0),
        ),
        Row(
            "RF-NLL (suffix, rewrite, 1 rollout)",
            "table6_rf_nll_suffix_rewrite_rollout",
            (50.1, 51.1, None, None, 84.6),
        ),
        Row("DPO (suffix, 1 rollout)", "table6_dpo_suffix_rollout", (55.7, 84.7, None, None, 82.5)),
        Row(
            "DPO (rewrite, 1 rollout)", "table6_dpo_rewrite_rollout", (60.2, 87.2, None, None, 81.9)
        ),
        Row(
            "DPO (suffix, 16 rollouts)",
            "table6_dpo_suffix_16_rollouts",
            (73.6, 77.7, None, None, 91.1),
        ),
        Row(
            "DPO (suffix, rewrite, 16 rollouts)",
            "table6_dpo_suffix_rewrite_16_rollouts",
            (72.5, 75.4, None, None, 88.9),
        ),
        Row(
            "DPO (suffix as pivot, 16 rollouts)",
            "table6_dpo_suffix_pivot",
            (59.6, 51.9, None, None, 89.0),
        ),
        Row("DPO (16 rollouts)", "table6_dpo_16_rollouts", (71.1, 72.0, None, None, 88.9)),
    ],
    "rollouts": [
        *rollouts_rows(
            "quality",
            "table1_quality",
            K2=(69.9, None, 67.6),
            K4=(75.5, None, 71.2),
            K8=(84.3, None, 86.8),
            K16=(86.3, None, 87.9),
        ),
        *rollouts_rows(
            "factuality",
            "table1_factuality",
            K2=(65.2, None, None, 46.2),
            K4=(69.0, None, None, 48.8),
            K8=(83.1, None, None, 56.9),
            K16=(84.0, None, None, 57.6),
        ),
        *rollouts_rows(
            "safety",
            "table6_dpo_suffix_16_rollouts",
            K1=(55.7, None, None, None, 82.5),
            K2=(57.3, None, None, None, 86.2),
            K4=(63.0, None, None, None, 85.2),
            K8=(69.0, None, None, None, 85.4),
            K16=(73.6, None, None, None, 91.1),
        ),
    ],
    "pivot": [
        Row("quality, all pairs", "rollouts_quality_8", (84.3,)),
        Row("quality, pivot", "pivot_quality", (72.1,)),
        Row("factuality, all pairs", "rollouts_factuality_8", (83.1, None, None, 56.9)),
        Row("factuality, pivot", "pivot_factuality", (64.2, None, None, 55.7)),
    ],
    "judge": [
        Row("prompted 120B / exact", "rollouts_quality_8", (84.3, None, 86.8)),
        Row("fine-tuned 8B / noise 0.15", "judge_quality_8b", (72.1, None, 72.7)),
        Row("- / noise 0.3", "judge_quality_8b", (), {"dials": "share_unsafe=0,noise=0.3"}),
    ],
    "forgetting": [
        Row("nll_weight 0", "rollouts_quality_4"),
        Row("nll_weight 1", "rollouts_quality_4", (), {"nll_weight": 1.0}),
        Row("nll_weight 4", "rollouts_quality_4", (), {"nll_weight": 4.0}),
    ],
    "overlap": [
        Row("overlap 0", "rollouts_quality_4"),
        Row("overlap 1", "rollouts_quality_4", (), {"overlap": 1}),
        Row("overlap 2", "rollouts_quality_4", (), {"overlap": 2}),
    ],
    # The rewriter knows a quarter of the facts, not three; leaves three faults of four, not one.
    "rewriter": [
        Row(f"{label}, {name} rewriter", config, (), changes)
        for name, changes in (("usual", {}), ("weak", {"dials": WEAK_REWRITER}))
        for label, config in (
            ("SFT (rewrite)", "table6_sft_rewrite"),
            ("RF-NLL (rollout, rewrite)", "table6_rf_nll_rollout_rewrite"),
            ("DPO (rewrite, 1 rollout)", "table6_dpo_rewrite_rollout"),
        )
    ],
    # Which schedule names the best and the worst: under a judge that errs, on the world's own mix.
    "schedules": [
        Row(f"K = {K}, {name}", config, (), {"comparisons": name, "dials": "noise=0.1"})
        for K, config in ((8, "rollouts_quality_8"), (16, "table1_quality"))
        for name in ("all", "race", "pivot")
    ],
}
