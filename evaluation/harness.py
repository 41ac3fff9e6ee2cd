"""Results of lm-evaluation-harness beside ours: the paper's standard evaluations, and TruthfulQA.

A checkpoint is a Hugging Face folder, so the harness evaluates it as it is (docs/evaluation.md):

    lm_eval --model hf --model_args pretrained=CKPT --output_path harness --tasks boolq,piqa,...
    python -m evaluation.evaluate CKPT --harness harness

In: its results_*.json, or folders of them, of one or several models. Out: the scores by task.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from evaluation.results import aligned, show
from support.command import UserError

# The paper's standard evaluations; their mean weighs tasks alike.
STANDARD = (
    *("boolq", "piqa", "social_iqa", "hellaswag"),
    *("arc_easy", "arc_challenge", "openbookqa", "mmlu"),
)
TRUTHFULQA = ("truthfulqa_mc1", "truthfulqa_mc2")


@dataclass
class Score:
    metric: str  # acc_norm, accuracy normalised by length, where the task has it, else acc
    mean: float  # between 0 and 1
    error: float  # standard error of the mean
    count: int  # of questions
    shots: int | None  # examples in the prompt

    def values(self) -> list[float]:
        """`count` numbers with this mean and standard error, which are all that a result tells of
        its questions: as many lie above the mean as below, by one distance."""
        n, pairs = self.count, self.count // 2
        # error² = variance / n, variance = 2 pairs · distance² / (n - 1)
        distance = self.error * math.sqrt(n * (n - 1) / max(2 * pairs, 1))
        around = [self.mean - distance, self.mean + distance] * pairs
        return around + [self.mean] * (n % 2)


def read(paths: list[str]) -> dict[str, dict[str, Score]]:
    """model, as the harness calls it -> task -> Score; of one task in several files the newest.

    UserError where a path holds no result of the harness.
    """
    found: dict[str, dict[str, Score]] = {}
    for path in map(place, paths):
        # The names of the files end with the time of writing.
        inside = sorted(path.rglob("results_*.json"), key=lambda file: file.name)
        files = inside if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no results_*.json of lm_eval --output_path")
        for file in files:
            try:
                result = json.loads(file.read_text(encoding="utf-8"))
                scores = {task: score_of(task, result) for task in (*STANDARD, *TRUTHFULQA)}
                known = found.setdefault(str(result["model_name"]), {})
                known.update({task: score for task, score in scores.items() if score})
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file} is no results_*.json of lm_eval --output_path: {error!r}"
                ) from None
    return found


def place(folder: str) -> Path:
    return Path(folder).expanduser().resolve()


def score_of(task: str, result: dict) -> Score | None:
    """Of one task in a result; None where it was not run."""
    scores = result["results"].get(task)
    if scores is None:
        return None
    named = {key.partition(",")[0]: value for key, value in scores.items()}
    metric = "acc_norm" if "acc_norm" in named else "acc"
    mean, error = float(named[metric]), named.get(f"{metric}_stderr")
    counts = result["n-samples"]  # of a group, as mmlu is, only of its parts: mmlu_anatomy, ...
    parts = [task] if task in counts else [name for name in counts if name.startswith(f"{task}_")]
    count = sum(counts[part]["effective"] for part in parts)
    if not isinstance(error, float):  # "N/A": at most that of a share
        error = math.sqrt(mean * (1 - mean) / count)
    return Score(metric, mean, error, count, result.get("n-shot", {}).get(parts[0]))


def scores_of(policies: dict[str, str], paths: list[str]) -> dict[str, dict[str, Score]]:
    """Of each policy (name -> folder) the scores in the results of its folder.

    A single result is that of a single policy, wherever its folder lay. UserError where a policy
    has none, for means over different tasks do not compare. {} without a path.
    """
    if not paths:
        return {}
    found = read(paths)
    if len(found) == 1 and len(set(map(place, policies.values()))) == 1:
        return dict.fromkeys(policies, next(iter(found.values())))
    by_folder = {place(name): scores for name, scores in found.items()}
    for name, folder in policies.items():
        if place(folder) not in by_folder:
            raise UserError(
                f"--harness {' '.join(paths)}: of {', '.join(found)}, not of {name} {folder}: "
                f"run lm_eval --model_args pretrained={folder} too"
            )
    return {name: by_folder[place(folder)] for name, folder in policies.items()}


def factuality(scores: dict[str, dict[str, Score]]) -> dict:
    """policy -> TruthfulQA's task -> {"factuality": values}, as `evaluate.judged` gives them."""
    tasks = [task for task in TRUTHFULQA if all(task in found for found in scores.values())]
    return {
        name: {task: {"factuality": found[task].values()} for task in tasks}
        for name, found in scores.items()
    }


def table(scores: dict[str, dict[str, Score]]) -> str:
    """A row a task, a column a policy, and the mean of the standard tasks where all were run."""
    rows = [["task", "metric", "shots", "n", *scores]]
    for task in (*STANDARD, *TRUTHFULQA):
        each = [found.get(task) for found in scores.values()]
        if known := next(filter(None, each), None):
            cells = [one.mean if one else None for one in each]
            spreads = [one and [-1.96 * one.error, 1.96 * one.error] for one in each]
            shown = map(show, cells, spreads)
            rows.append([task, known.metric, str(known.shots), str(known.count), *shown])
    means = [standard_mean(found) for found in scores.values()]
    if any(mean is not None for mean in means):
        rows.append(["standard (mean)", "", "", "", *map(show, means)])
    return aligned(rows)


def standard_mean(found: dict[str, Score]) -> float | None:
    if not all(task in found for task in STANDARD):
        return None
    return sum(found[task].mean for task in STANDARD) / len(STANDARD)
