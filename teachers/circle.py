"""The circle in miniature: train a judge and a rewriter, serve them, let them teach a policy.

    python -m teachers.circle [--seeds 0 1 2] [--out out/circle]      one after another
    python -m study.reproduce circle                                  side by side

In: nothing; the pocket world and its exact teacher. For each seed, all by train.py's one loop:
  1. lessons      a teacher's base: next-token prediction on documents of the pocket world whose
                  sentences are marked + (sound) or - (false, unsafe, garbled, repeated, off topic),
                  one by one or several together
  2. sets         teachers/sets.py asks the exact teacher for spoilt passages, votes and rewrites,
                  and which is better, an original or a rollout of the policy that is to be taught
  3. judge        a cold start on supervised answers, just enough to answer in form; then GRPO
  4. rewriter     the same; unsafe suffixes are rewarded by the judge of step 3, served by serve.py
  5. policy       self-improving pretraining with these two, served, as its only teachers
Out: OUT/seedN (run folders, figures.json). Judge, rewriter and policy are evaluated by
the exact teacher. What is finished is not done again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
from pathlib import Path

from support import command
from support.command import UserError, python
from support.files import write_text
from support.sources import Skips, records
from support.tokenizer import from_words
from teachers.serve import start_server
from teachers.sets import DAMAGES, ROLLOUT
from tools.plot import read_json
from world.corpus import Dials, document, vocabulary
from world.teacher import rewrite
from world.truth import examine, read_prefix, safe

STAGES = command.ROOT / "configs" / "circle.py"
PEOPLE = 6  # a small world: its 96 facts are learned in minutes
LESSONS = Dials(share_myths=0.0, share_false=0.4, share_unsafe=0.15, share_poor=0.15, people=PEOPLE)
MARKS = {"sound": "+", "filler": "", "begun": "", "unfinished": ""}  # of any other sentence: -
LESSON_COUNT = 50_000
ROWS = dict(quality=12_000, safety=4_000, rewriter=8_000)


def run(module: str, *arguments, **flags):
    """A command of this repository, its output kept; one thread, since seeds run side by side."""
    asked = [*python(module, *arguments), *(f"--{name}={value}" for name, value in flags.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{module} {' '.join(map(str, arguments))} {flags} failed: {said}")


def stage(out: Path, seed: int, name: str, *command_line, **flags) -> Path:
    """A run of train.py or teachers/train.py, unless it is finished. -> its checkpoint"""
    if not (out / name / "summary.json").exists():
        run(*command_line, f"{STAGES}:{name}", out_dir=out / name, seed=seed, **flags)
    return out / name / "ckpt"


# ------------------------------------------------------------------------------------------------
# 1. Lessons


def lesson(number: int, seed: int) -> str:
    """A document with a mark after each finished sentence. Half of them have no marks at first,
    then a line that is + if at least half of these sentences are sound: read, and judged late."""
    words, rng = document(seed, number, LESSONS).split(), random.Random(f"{seed}/{number}")
    start, late = rng.choice((0, 8, 16)), rng.choice((0, 0, 24, 40))  # words
    prefix = " ".join(words[:start])
    begun, text, marks = len(read_prefix(prefix).tail), prefix, ""
    for sentence in examine(prefix, " ".join(words[start:])):
        mark = MARKS.get(sentence.verdict, "-")
        text, marks = f"{text} {' '.join(sentence.text.split()[begun:])}", marks + mark
        begun = 0
        if not late:
            text += mark
        elif len(text.split()) >= late:
            text += "\n+\n" if 2 * marks.count("+") >= len(marks) else "\n-\n"
            late = 0
    return text.strip()


# ------------------------------------------------------------------------------------------------
# 2. Sets


def write_sets(out: Path, seed: int, policy: Path):
    """The files of teachers/sets.py, and rows of them again with the answer that a tiny prompt
    wants: the label, the original, or the original with nothing but its unsafe sentences replaced.
    Of unsafe originals one in four: to mend is learned sooner than to copy."""
    for made, count in ROWS.items():
        size = dict(chunk=32, max_seq=64, count=count, seed=seed, dials=f"people={PEOPLE}")
        shown = dict(policy=policy, votes=3) if made == "quality" else {}
        run("teachers.sets", made, out=out, **size, **shown)
        rows = [row for _, row in records(str(out / f"{made}.train.jsonl.zst"), Skips())]
        kept = [row for row in rows if row.get("safe", True) or int(row["document"], 16) % 4 == 0]
        lines = (json.dumps(row | {"answer": model_answer(row)}) + "\n" for row in kept)
        write_text(out / f"{made}.cold.jsonl", "".join(lines))


def model_answer(row: dict) -> str:
    if row["task"] != "rewrite" or row["safe"]:
        return row["original" if row["task"] == "rewrite" else "label"]
    able, original = Dials(rewriter_flaws=0.0), row["original"]
    mended = rewrite(row["prefix"], original, able, faults=("unsafe",))
    return original[: -len(original.lstrip())] + mended


# ------------------------------------------------------------------------------------------------
# 3. to 5. Training


def circle(out: Path, seed: int) -> dict:
    """All stages of one seed. -> its figures, shares between 0 and 1."""
    sets, evaluation = out / "sets", out / "policy" / "evaluation.json"
    start = stage(out, seed, "start", "train")
    if not (sets / "rewriter.cold.jsonl").exists():
        sets.mkdir(parents=True, exist_ok=True)
        lessons = (json.dumps({"text": lesson(n, seed)}) + "\n" for n in range(LESSON_COUNT))
        write_text(out / "lessons.jsonl", "".join(lessons))
        from_words([*vocabulary(), "SAFE", "UNSAFE"]).save(out / "words")  # a verdict is a token
        write_sets(sets, seed, start)

    def teacher(name: str, *made: str, **flags) -> Path:
        """A cold start on supervised answers, then GRPO. -> the checkpoint of the latter."""
        cold, rows = (
            ",".join(str(sets / f"{each}.{ending}") for each in made)
            for ending in ("cold.jsonl", "train.jsonl.zst")
        )
        how = "teachers.train", name
        begin = stage(out, seed, f"{name}_cold", *how, data=cold, init_from=base)
        return stage(out, seed, name, *how, data=rows, init_from=begin, **flags)

    words = dict(data=out / "lessons.jsonl", tokenizer=out / "words")
    base = stage(out, seed, "base", "train", **words)
    with (
        start_server(teacher("judge", "quality", "safety")) as judge_url,
        start_server(teacher("rewriter", "rewriter", judge_url=judge_url)) as rewrite_url,
    ):
        urls = dict(judge_url=judge_url, rewrite_url=rewrite_url)
        policy = stage(out, seed, "policy", "train", init_from=start, **urls)
    if not evaluation.exists():
        how = dict(baseline=start, max_seq=64, dials=f"people={PEOPLE}")
        run("evaluation.evaluate", policy, out=evaluation, **how)
    return figures(out)


# ------------------------------------------------------------------------------------------------
# What came out


def figures(folder: Path) -> dict:
    out = {}
    judged, rewrote = (read_json(folder / name / "summary.json") for name in ("judge", "rewriter"))
    for name, label in (("cold", "base"), ("grpo", "method")):
        found, texts = judged["values"][label], rewrote["continuations"][label]["safe"]
        out[f"judge.safety.{name}"] = judged["policies"][label]["safety"]["reward"]
        for kind, damages in (("quality", DAMAGES), ("rollouts", (ROLLOUT,))):
            rows = zip(judged["rows"], found["quality"]["reward"], strict=True)
            right = [value for row, value in rows if row.get("damage") in damages]
            out[f"judge.{kind}.{name}"] = statistics.mean(right)
        pairs = list(zip(texts, rewrote["rows"], strict=True))
        copied = [text.strip() == row["original"].strip() for text, row in pairs if row["safe"]]
        out[f"rewriter.copied.{name}"] = statistics.mean(copied)
        mended = [safe(text) for text, row in pairs if not row["safe"]]
        out[f"rewriter.safe.{name}"] = statistics.mean(mended)
    for name, kinds in read_json(folder / "policy" / "evaluation.json")["policies"].items():
        for measure in ("quality", "safety", "factuality"):
            each = [cell[measure] for cell in kinds.values()]
            out[f"policy.{measure}.{name}"] = statistics.mean(each)
    return out


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag.add_argument("--out", type=Path, default=Path("out/circle"))
    options = flag.parse_args(arguments)
    for seed in options.seeds:
        found = json.dumps(circle(options.out / f"seed{seed}", seed), indent=2)
        write_text(options.out / f"seed{seed}" / "figures.json", found + "\n")
        print(f"seed {seed}: {found}")


if __name__ == "__main__":
    command.run(main)
