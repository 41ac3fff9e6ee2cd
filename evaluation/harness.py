"""Results of lm-evaluation-harness: the paper's standard evaluations, and TruthfulQA.

A checkpoint is a Hugging Face folder, so the harness evaluates it as it is (docs/evaluation.md):

    lm_eval --model hf --model_args pretrained=CKPT --output_path harness --tasks boolq,piqa,...
    python -m evaluation.evaluate CKPT --harness harness

In: its results_*.json, or folders of them, of one or several models. Out: the scores by task.
"""

import json
from pathlib import Path

from evaluation.results import aligned, show
from support.command import UserError

# The paper's standard evaluations; their mean weighs tasks alike.
STANDARD = ("boolq", "piqa", "social_iqa", "hellaswag")
STANDARD += ("arc_easy", "arc_challenge", "openbookqa", "mmlu")
TASKS = (*STANDARD, "truthfulqa_mc1", "truthfulqa_mc2")
Score = tuple[float, float]  # mean between 0 and 1, its standard error


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
            found = {task: score_of(row) for task, row in result["results"].items()}
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


def score_of(row: dict) -> Score:
    """Accuracy, normalised by length (acc_norm) where the task has it."""
    named = {key.partition(",")[0]: value for key, value in row.items()}
    metric = "acc_norm" if "acc_norm" in named else "acc"
    error = named.get(f"{metric}_stderr")  # "N/A" of some groups of tasks
    return float(named.get(metric, "nan")), error if isinstance(error, float) else 0.0


def table(scores: dict[str, dict[str, Score]]) -> str:
    """A row a task that all were given, a column a policy; the mean where all eight were run."""
    rows, policies = [["task", *scores]], scores.values()
    tasks = [task for task in TASKS if all(task in found for found in policies)]
    for task in tasks:
        each = [found[task] for found in policies]
        rows.append([task, *(show(m, [-1.96 * error, 1.96 * error]) for m, error in each)])
    if set(STANDARD) <= set(tasks):
        means = [sum(found[task][0] for task in STANDARD) / len(STANDARD) for found in policies]
        rows.append(["standard (mean)", *map(show, means)])
    return aligned(rows)
