"""The paper's findings as tests on the records of the miniature runs, fixed before most of them.

In: {row: {seed: record}} (reproduce.py's records; a row is its config and its changes). Out: for
each finding a verdict and the figures it rests on. One rule everywhere: a is higher than b when it
is in every seed, and on average by more than the standard deviation of the difference over seeds.
"As good as" and "no harm" mean that the other is not higher by that rule: that three seeds showed
no loss beyond their spread, not that there is none.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from study.tables import COLUMNS, TABLES, WEAK_REWRITER

WORDS = {True: "reproduced", None: "partly reproduced", False: "not reproduced"}
OWN_WORDS = {True: "holds", None: "holds in part", False: "does not hold"}


class Missing(Exception):
    """A row has runs that are not finished."""


class Study(dict):
    seeds = (0, 1, 2)  # of every row

    def values_of(self, row: str, column: str) -> list[float]:
        """Of the seeds in order."""
        if set(self.get(row, ())) != set(self.seeds):
            raise Missing(row)
        return [record[column] for _, record in sorted(self[row].items())]

    def gain(self, row: str, column: str) -> list[float]:
        """Over the seed's base."""
        pairs = zip(self.values_of(row, column), self.values_of(row, f"base.{column}"), strict=True)
        return [ours - base for ours, base in pairs]


@dataclass(frozen=True)
class Part:
    """One condition of a finding."""

    holds: bool
    evidence: str


@dataclass(frozen=True)
class Finding:
    claim: str
    tables: str  # python reproduce.py TABLES, or "circle": python circle.py
    check: Callable | str  # Study -> [Part], or why it cannot be tested in miniature


def higher(a: list[float], b: list[float]) -> bool:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return min(differences) > 0 and statistics.mean(differences) > spread


def mean_of(values: list[float], digits: int = 1) -> str:
    return f"{statistics.mean(values):.{digits}f}"


def versus(name: str, a: list[float], b: list[float], digits: int = 1) -> Part:
    """That a is higher than b."""
    spread = statistics.stdev(x - y for x, y in zip(a, b, strict=True)) if len(a) > 1 else 0.0
    mean = statistics.mean(a) - statistics.mean(b)
    text = f"{name} {mean_of(a, digits)} against {mean_of(b, digits)}"
    return Part(higher(a, b), f"{text} ({mean:+.{digits}f}, spread {spread:.{digits}f})")


def not_lower(name: str, a: list[float], b: list[float], digits: int = 1) -> Part:
    """That b is not higher than a."""
    return Part(not higher(b, a), versus(name, a, b, digits).evidence)


def share(name: str, part: list[float], whole: list[float], most: float) -> Part:
    """That a gain is at most a share of another."""
    a, b = statistics.mean(part), statistics.mean(whole)
    return Part(a <= most * b, f"{name} {a:+.1f} (asked: at most {most:g} of {b:+.1f})")


# ------------------------------------------------------------------------------------------------
# The paper's findings

Q, F, S = "table1_quality", "table1_factuality", "table1_safety"


def quality_gain(study):
    wins = study.values_of(Q, "quality_clean")
    return [versus("win rate on clean prefixes", wins, [50.0] * len(wins))]


def target_gain(row, column):
    def check(study):
        return [
            versus(column, study.values_of(row, column), study.values_of(row, f"base.{column}"))
        ]

    return check


def next_token(study):
    """Less than a fifth of what the method gains, either way, in each of its three targets."""
    parts = []
    for row, column in ((Q, "quality_clean"), (F, "factuality"), (S, "safety")):
        whole = statistics.mean(study.gain(row, column))
        for corpus in ("slimpajama", "redpajama"):
            gain = statistics.mean(study.gain(f"table1_pretrain_{corpus}", column))
            evidence = f"{COLUMNS[column]} {gain:+.1f} on {corpus} (the method: {whole:+.1f})"
            parts.append(Part(abs(gain) < whole / 5, evidence))
    return parts


def specialists(study):
    """The paper's own figures give the other target at most 0.58 of the gain."""
    return [
        versus("factuality", study.values_of(F, "factuality"), study.values_of(S, "factuality")),
        share(
            "optimising safety: factuality",
            study.gain(S, "factuality"),
            study.gain(F, "factuality"),
            0.6,
        ),
        versus("safety", study.values_of(S, "safety"), study.values_of(F, "safety")),
        share(
            "optimising factuality: safety", study.gain(F, "safety"), study.gain(S, "safety"), 0.6
        ),
    ]


def from_scratch(study):
    best, text, rewrite = (
        f"table2_{name}" for name in ("rf_nll_rollout_rewrite", "baseline", "nll_rewrite")
    )
    quality = {row: study.values_of(row, "quality_clean") for row in (best, text, rewrite)}
    return [
        versus("quality, RF-NLL against NLL on text", quality[best], quality[text]),
        versus("quality, RF-NLL against NLL on rewrites", quality[best], quality[rewrite]),
        versus(
            "safety, NLL on rewrites against text",
            study.values_of(rewrite, "safety"),
            study.values_of(text, "safety"),
        ),
    ]


def fine_tuning(study):
    """Collapse: most comparisons with the base are lost. Little: less than half of DPO's gain."""
    own, rewrite, dpo = "table6_sft_rollout", "table6_sft_rewrite", "table6_dpo_suffix_16_rollouts"
    collapsed = study.values_of(own, "quality_clean")
    return [
        Part(
            max(collapsed) < 25,
            f"quality after SFT on own rollouts {mean_of(collapsed)} (asked: below 25 in each)",
        ),
        versus(
            "safety after SFT on rewrites",
            study.values_of(rewrite, "safety"),
            study.values_of(rewrite, "base.safety"),
        ),
        share(
            "its gain in quality",
            study.gain(rewrite, "quality_clean"),
            study.gain(dpo, "quality_clean"),
            0.5,
        ),
    ]


def dpo_over_rf_nll(study):
    dpo, rf = "table6_dpo_rewrite_rollout", "table6_rf_nll_rollout_rewrite"
    return [
        versus(f"{COLUMNS[c]}, DPO against RF-NLL", study.values_of(dpo, c), study.values_of(rf, c))
        for c in ("quality_clean", "quality_unsafe")
    ]


def more_rollouts(study):
    """The most beat the fewest, and the means are in order with at most one neighbour swapped."""
    parts = []
    for reward, rows in ROLLOUTS.items():
        values = [study.values_of(row, "quality_clean") for row in rows]
        means = [statistics.mean(v) for v in values]
        falls = sum(b < a for a, b in zip(means, means[1:], strict=False))
        text = f"{reward}: " + ", ".join(f"{mean:.1f}" for mean in means)
        parts.append(Part(higher(values[-1], values[0]) and falls <= 1, text))
    return parts


ROLLOUTS = {
    "quality": [*(f"rollouts_quality_{K}" for K in (2, 4, 8)), Q],
    "factuality": [*(f"rollouts_factuality_{K}" for K in (2, 4, 8)), F],
    "safety": [
        "table6_dpo_suffix_rollout",
        *(f"rollouts_safety_{K}" for K in (2, 4, 8)),
        "table6_dpo_suffix_16_rollouts",
    ],
}


def chosen_rate(study):
    return [
        versus(
            f"{name}, last against first quarter",
            *(
                [100 * x for x in study.values_of(row, f"chosen.{when}")]
                for when in ("last", "first")
            ),
        )
        for name, row in (
            ("DPO, rewrite and 1 rollout", "table6_dpo_rewrite_rollout"),
            ("DPO, suffix, rewrite and 16", "table6_dpo_suffix_rewrite_16_rollouts"),
            ("RF-NLL from scratch", "table2_rf_nll_rollout_rewrite"),
        )
    ]


def pivot_is_worse(study):
    rows = {
        "quality": ("rollouts_quality_8", "pivot_quality"),
        "factuality": ("rollouts_factuality_8", "pivot_factuality"),
        "safety": ("table6_dpo_suffix_16_rollouts", "table6_dpo_suffix_pivot"),
    }
    return [
        versus(
            f"{name} run, all pairs against pivot",
            *(study.values_of(row, "quality_clean") for row in pair),
        )
        for name, pair in rows.items()
    ]


def weaker_judge(study):
    rows = [
        "rollouts_quality_8",
        "judge_quality_8b",
        "judge_quality_8b --dials=share_unsafe=0,noise=0.3",
    ]
    values = [study.values_of(row, "quality_clean") for row in rows]
    return [versus("noise 0 against 0.15", *values[:2]), versus("0.15 against 0.3", *values[1:])]


def no_judge(study):
    """Little: less than half of what DPO with the judge gains."""
    row, dpo = "table6_dpo_rewrite_over_rollout", "table6_dpo_suffix_16_rollouts"
    return [
        share(COLUMNS[column], study.gain(row, column), study.gain(dpo, column), 0.5)
        for column in ("quality_clean", "safety")
    ]


def of_circle(study, measure: str) -> list[float]:
    """A figure of circle.py in %, of all seeds."""
    found = study.get("circle", {})
    if {int(seed) for seed in found} != set(study.seeds):
        raise Missing("circle.py")
    return [100 * found[seed][measure] for seed in sorted(found)]


def near_chance(name: str, values: list[float]) -> Part:
    holds = all(40 <= value <= 60 for value in values)
    return Part(holds, f"{name} {mean_of(values)} (asked: 40 to 60 in each seed)")


def above_90(name: str, values: list[float]) -> Part:
    return Part(min(values) > 90, f"{name} {mean_of(values)} (asked: above 90 in each seed)")


def judge_training(study):
    """On held-out pairs, a text and its spoilt version in both orders."""
    cold, trained = (of_circle(study, f"judge.quality.{when}") for when in ("cold", "grpo"))
    return [near_chance("accuracy after the cold start", cold), above_90("after GRPO", trained)]


def rewriter_training(study):
    copied, safe = (of_circle(study, f"rewriter.{what}.grpo") for what in ("copied", "safe"))
    return [
        above_90("exact copies of safe text", copied),
        above_90("safe rewrites of unsafe text", safe),
    ]


# ------------------------------------------------------------------------------------------------
# Beyond the paper

K4 = "rollouts_quality_4"


def forgetting(study):
    """The term lowers the held-out NLL and costs less than a fifth of the gain in quality."""
    weighted = f"{K4} --nll_weight=4.0"
    kept = statistics.mean(study.gain(weighted, "quality")) / statistics.mean(
        study.gain(K4, "quality")
    )
    return [
        versus(
            "held-out NLL without and with the term",
            study.values_of(K4, "nll"),
            study.values_of(weighted, "nll"),
            2,
        ),
        Part(kept > 0.8, f"{100 * kept:.0f} % of the gain in quality kept"),
    ]


def weak_rewriter(study):
    """With a rewriter that mostly fails, DPO is ahead of both that imitate what is best at hand."""
    sft, rf, dpo = (f"{row.config} --dials={WEAK_REWRITER}" for row in TABLES["rewriter"][3:])
    ours = study.values_of(dpo, "quality_clean")
    return [
        versus(
            "quality, clean, DPO against SFT on rewrites",
            ours,
            study.values_of(sft, "quality_clean"),
        ),
        versus("against RF-NLL", ours, study.values_of(rf, "quality_clean")),
    ]


def schedules(study):
    quality, name = {}, {}
    for how in ("all", "race", "pivot"):
        row = f"table1_quality --comparisons={how} --dials=noise=0.1"
        quality[how] = study.values_of(row, "quality")
        name[how] = f"{how} ({mean_of(study.values_of(row, 'questions'), 0)} questions)"
    return [
        not_lower(f"{name['race']} against {name['all']}", quality["race"], quality["all"]),
        versus(f"race against {name['pivot']}", quality["race"], quality["pivot"]),
    ]


def staleness(study):
    fresh = study.values_of(K4, "quality")
    return [
        not_lower(
            f"quality, overlap {n} against 0",
            study.values_of(f"{K4} --overlap={n}", "quality"),
            fresh,
        )
        for n in (1, 2)
    ]


def over_refusal(study):
    return [
        not_lower(
            f"{column} on clean prefixes, after and before",
            study.values_of(S, f"{column}_clean"),
            study.values_of(S, f"base.{column}_clean"),
        )
        for column in ("quality", "factuality", "coherence")
    ]


FINDINGS = [
    Finding(
        "Trained for quality, the policy's continuations beat the base's", "table1", quality_gain
    ),
    Finding("Trained for factuality, it is more factual", "table1", target_gain(F, "factuality")),
    Finding("Trained for safety, it is safer", "table1", target_gain(S, "safety")),
    Finding("Further next-token training does nothing of this", "table1", next_token),
    Finding("Optimising safety does not bring factuality, nor the reverse", "table1", specialists),
    Finding(
        "From scratch, RF-NLL on rollout or rewrite beats NLL on text and on rewrites in quality; "
        "rewrites alone bring safety",
        "table2",
        from_scratch,
    ),
    Finding(
        "SFT on own rollouts collapses; SFT on rewrites brings safety, but little quality",
        "table6",
        fine_tuning,
    ),
    Finding("Online DPO beats RF-NLL on the same candidates", "table6", dpo_over_rf_nll),
    Finding("More rollouts are better", "rollouts", more_rollouts),
    Finding(
        "The policy's own rollouts are chosen more and more often", "table2 table6", chosen_rate
    ),
    Finding(
        "Comparing with a pivot is worse than comparing all pairs", "pivot table6", pivot_is_worse
    ),
    Finding("A weaker judge gives a weaker policy", "judge", weaker_judge),
    Finding(
        "Untrained judges are near chance on corrupted pairs; GRPO lifts them over 90 %",
        "circle",
        judge_training,
    ),
    Finding(
        "The rewriter learns to copy safe text and to rewrite unsafe text",
        "circle",
        rewriter_training,
    ),
    Finding(
        "Factuality prompts order by strictness, v1 to v5, and a reference raises agreement",
        "",
        "the pocket world's teacher computes its verdict instead of reading the instructions, so "
        "every wording gets the same answer; `python judge.py bench` measures it on a real judge",
    ),
    Finding(
        "DPO with the rewrite always chosen over the rollout, without a judge, helps only a little",
        "table6",
        no_judge,
    ),
]
BEYOND = [
    Finding("An NLL term buys back what DPO forgets", "forgetting", forgetting),
    Finding(
        "The race is as good as all pairs, at a quarter of the questions (judge with noise 0.1)",
        "schedules",
        schedules,
    ),
    Finding("With a weak rewriter, DPO beats SFT and RF-NLL (8)", "rewriter", weak_rewriter),
    Finding("Judging one or two batches late does no harm", "overlap", staleness),
    Finding("Safety does not spoil clean prefixes", "table1", over_refusal),
]


def verdict(finding: Finding, study: Study) -> tuple[str, str]:
    """(verdict, evidence)."""
    if isinstance(finding.check, str):
        return "not testable in miniature", finding.check
    try:
        parts = finding.check(study)
    except Missing as row:
        return "not run", f"{row}: not finished"
    held = [part.holds for part in parts]
    words = OWN_WORDS if finding in BEYOND else WORDS
    word = words[True if all(held) else None if any(held) else False]
    evidence = (f"{'yes' if part.holds else 'no'}: {part.evidence}" for part in parts)
    return word, "; ".join(evidence)
