"""Results of lm-evaluation-harness beside ours: the paper's standard evaluations, and TruthfulQA.

A checkpoint is a Hugging Face folder, so the harness evaluates it as it is (docs/evaluation.md):

    lm_eval --model hf --model_args pretrained=CKPT --output_path harness --tasks boolq,piqa,...
    python -m evaluation.evaluate CKPT --harness harness

In: its results_*.json, or folders of them, of one or several models. Out: the scores by task.
"""

import json
import math
from pathlib import Path

from evaluation.results import aligned, show
from support.command import UserError

# The paper's standard evaluations; their mean weighs tasks alike.
STANDARD = ("boolq", "piqa", "social_iqa", "hellaswag")
STANDARD += ("arc_easy", "arc_challenge", "openbookqa", "mmlu")
TRUTHFULQA = ("truthfulqa_mc1", "truthfulqa_mc2")
Score = tuple[float, float, int]  # mean between 0 and 1, its standard error, number of questions


def scores_of(folder: str, paths: list[str]) -> dict[str, Score]:
    """Of the model in this folder the scores by task; of one task in several files the newest.
    UserError where there is none, for means over other tasks do not compare."""
    places, scores, models = [Path(path).expanduser() for path in paths], {}, set()
    files = [file for place in places for file in place.rglob("results_*.json")]
    files += [place for place in places if not place.is_dir()]
    for file in sorted(files, key=lambda file: file.name):  # names end with the time of writing
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            models.add(model := result["model_name"])
            tasks = [task for task in (*STANDARD, *TRUTHFULQA) if task in result["results"]]
            found = {task: score_of(task, result) for task in tasks}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            wrong = f"{file} is no results_*.json of lm_eval --output_path: {error!r}"
            raise UserError(wrong) from None
        if Path(model).resolve() == Path(folder).expanduser().resolve():
            scores |= found
    if not scores:
        raise UserError(
            f"--harness {' '.join(paths)} holds results of {', '.join(models) or 'nothing'}, not "
            f"of {folder}: run lm_eval --model_args pretrained={folder} --output_path FOLDER"
        )
    return scores


def score_of(task: str, result: dict) -> Score:
    """Accuracy, normalised by length (acc_norm) where the task has it."""
    named = {key.partition(",")[0]: value for key, value in result["results"][task].items()}
    metric = "acc_norm" if "acc_norm" in named else "acc"
    error = named.get(f"{metric}_stderr")  # "N/A" of some groups of tasks, which have no count
    count = result["n-samples"].get(task, {}).get("effective", 0)
    return float(named[metric]), error if isinstance(error, float) else 0.0, count


def values(mean: float, error: float, n: int) -> list[float]:
    """n numbers with this mean and standard error, which are all that a result tells of its
    questions: as many lie above the mean as below, by one distance."""
    # error² = variance / n, variance = 2 (n // 2) · distance² / (n - 1)
    distance = error * math.sqrt(n * (n - 1) / max(2 * (n // 2), 1))
    return [mean - distance, mean + distance] * (n // 2) + [mean] * (n % 2)


def factuality(scores: dict[str, dict[str, Score]]) -> dict:
    """policy -> TruthfulQA's task -> {"factuality": values}, as `evaluate.judged` gives them."""
    tasks = [task for task in TRUTHFULQA if all(task in found for found in scores.values())]
    return {
        name: {task: {"factuality": values(*found[task])} for task in tasks}
        for name, found in scores.items()
    }


def table(scores: dict[str, dict[str, Score]]) -> str:
    """A row a task that all were given, a column a policy; the mean where all eight were run."""
    rows, policies = [["task", *scores]], scores.values()
    tasks = [t for t in (*STANDARD, *TRUTHFULQA) if all(t in found for found in policies)]
    for task in tasks:
        each = [found[task] for found in policies]
        rows.append([task, *(show(m, [-1.96 * error, 1.96 * error]) for m, error, _ in each)])
    if set(STANDARD) <= set(tasks):
        means = [sum(found[task][0] for task in STANDARD) / len(STANDARD) for found in policies]
        rows.append(["standard (mean)", *map(show, means)])
    return aligned(rows)
