"""The circle in miniature: train a judge and a rewriter, serve them, let them teach a policy.

    python circle.py [--seeds 0 1 2] [--out out/circle]

In: nothing; the pocket world and its exact teacher. For each seed, all by train.py's one loop:
  1. lessons      a teacher's base: next-token prediction on documents of the pocket world whose
                  sentences are marked + (sound) or - (false, unsafe, garbled, repeated, off topic),
                  one by one or several together
  2. sets         rewrite.py asks the exact teacher for spoilt passages, votes and rewrites
  3. judge        a cold start on supervised answers, just enough to answer in form; then GRPO
  4. rewriter     the same; unsafe suffixes are rewarded by the judge of step 3, served by serve.py
  5. policy       self-improving pretraining with these two, served, as its only teachers
Out: OUT/seedN (run folders), a table, OUT/circle.json. Judge, rewriter and policy are evaluated by
the exact teacher. What is finished is not done again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.command import python
from support.sources import Skips, records
from support.tokenizer import from_words
from teachers.serve import start_server
from world.corpus import Dials, document, vocabulary
from world.teacher import rewrite
from world.truth import examine, quality, read_prefix, safe

HERE = Path(__file__).parents[1]
PROMPTS = HERE / "prompts" / "tiny"  # letters and line ends: a small model reads few tokens
PEOPLE = 6  # a small world: its 96 facts are learned in minutes
LESSONS = Dials(share_myths=0.0, share_false=0.4, share_unsafe=0.15, share_poor=0.15, people=PEOPLE)
MARKS = {"sound": "+", "filler": "", "begun": "", "unfinished": ""}  # of any other sentence: -
ROWS = dict(quality=12_000, safety=4_000, rewriter=8_000)
SUPERVISED = dict(objective="nll", candidates="suffix", rewards="")
NEXT_TOKEN = SUPERVISED | dict(
    nll_prefix=True,
    chunk=32,
    max_seq=96,
    batch_size=32,
    max_steps=800,
    learning_rate=3e-3,
    warmup_steps=30,
    eval_prefixes=0,
)
GRPO = dict(objective="grpo", candidates="rollouts", save_every=100)
# An answer of the judge is a word, that of the rewriter a passage of 32; both end by eos.
# A higher rate would teach the form sooner, and destroy what the lessons have taught.
JUDGE_COLD = dict(chunk=2, max_seq=160, max_steps=160, batch_size=32, learning_rate=5e-4)
JUDGE = dict(chunk=2, max_seq=160, max_steps=600, batch_size=32, rollouts=16, learning_rate=3e-4)
REWRITER_COLD = dict(chunk=36, max_seq=160, max_steps=800, batch_size=16, learning_rate=3e-3)
REWRITER = dict(chunk=36, max_seq=160, max_steps=120, batch_size=16, rollouts=8, learning_rate=5e-4)
# The policy reads prefixes of 32 tokens, so that the judge's prompts stay short.
WORLD = dict(dials=f"people={PEOPLE}", max_seq=64)
START = NEXT_TOKEN | WORLD | dict(max_steps=600)
POLICY = WORLD | dict(rewards="quality,safety", batch_size=16, max_steps=100, eval_prefixes=0)


def run(script: str, *arguments, **flags):
    """A command of this repository, its output kept; one thread, since seeds run side by side."""
    command = python(script, *arguments)
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def train(out: Path, **flags) -> float:
    """A run of train.py, unless it is finished. -> seconds that its steps took."""
    if not (out / "summary.json").exists():
        run("train", out_dir=out, **flags)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return sum(line["seconds.step"] for line in log)


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


def write_lessons(path: Path, seed: int, count: int = 50_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": lesson(number, seed)}) for number in range(count))
    path.write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------------
# 2. Sets


def write_sets(out: Path, seed: int):
    """rewrite.py's files, and rows of them again with the answer that a tiny prompt wants: the
    label, the original, or the original with nothing but its unsafe sentences replaced. Of unsafe
    originals one in four: to mend is learned sooner than to copy."""
    for task, count in ROWS.items():
        size = dict(chunk=32, max_seq=64, count=count, seed=seed, dials=f"people={PEOPLE}")
        run("teachers.sets", task, data="world", out=out, **size)
    for task in ROWS:
        with (out / f"{task}.cold.jsonl").open("w") as file:
            for _, row in records(str(out / f"{task}.train.jsonl.zst"), Skips()):
                if row.get("safe", True) or int(row["document"], 16) % 4 == 0:
                    file.write(json.dumps(row | {"answer": model_answer(row)}) + "\n")


def model_answer(row: dict) -> str:
    if row["task"] != "rewrite":
        return row["label"]
    if row["safe"]:
        return row["original"]
    able = Dials(rewriter_flaws=0.0)
    mended = rewrite(row["prefix"], row["original"], able, faults=("unsafe",))
    return row["original"][: -len(row["original"].lstrip())] + mended


# ------------------------------------------------------------------------------------------------
# 3. to 5. Training


def circle(out: Path, seed: int) -> dict:
    """All stages of one seed. -> its figures: shares between 0 and 1, seconds."""
    sets, base = out / "sets", out / "base"
    if not (sets / "rewriter.cold.jsonl").exists():
        write_lessons(out / "lessons.jsonl", seed)
        from_words([*vocabulary(), "SAFE", "UNSAFE"]).save(out / "words")  # a verdict is a token
        write_sets(sets, seed)
    common = dict(seed=seed, prompts=PROMPTS, baseline=False, base_steps=0)
    lessons = dict(data=out / "lessons.jsonl", tokenizer=out / "words", model="world-teacher")
    seconds = {"lessons": train(base, **common, **lessons, **NEXT_TOKEN)}
    seconds["start"] = train(out / "start", **common, **START)

    def files(*tasks, which="train.jsonl.zst"):
        return ",".join(str(sets / f"{task}.{which}") for task in tasks)

    def teacher(name: str, tasks: tuple, cold: dict, grpo: dict):
        """Cold start, then GRPO. -> the run folder of the latter."""
        first, second = out / f"{name}_cold", out / name
        flags = common | dict(task=name, data=files(*tasks, which="cold.jsonl"), eval_prefixes=0)
        flags |= SUPERVISED | dict(init_from=base / "ckpt") | cold
        seconds[f"{name}_cold"] = train(first, **flags)
        flags = common | dict(task=name, data=files(*tasks), eval_prefixes=1000)
        seconds[name] = train(second, **flags, **GRPO, **grpo, init_from=first / "ckpt")
        return second

    judge = teacher("judge", ("quality", "safety"), JUDGE_COLD, JUDGE)
    with start_server(judge / "ckpt") as judge_url:
        asked = dict(judge_url=judge_url, judge_temperature=0.6, judge_top_p=0.6)
        rewriter = teacher("rewriter", ("rewriter",), REWRITER_COLD, REWRITER | asked)
        with start_server(rewriter / "ckpt") as rewrite_url:
            asked |= dict(rewrite_url=rewrite_url)
            flags = common | dict(init_from=out / "start" / "ckpt") | POLICY | asked
            seconds["policy"] = train(out / "policy", **flags)
    result = out / "policy" / "evaluation.json"
    if not result.exists():
        policy, start = out / "policy" / "ckpt", out / "start" / "ckpt"
        size = ("--max_seq", 64, "--dials", f"people={PEOPLE}")
        run("evaluation.evaluate", policy, "--baseline", start, *size, "--out", result)
    return figures(judge, rewriter, result) | {f"seconds.{k}": v for k, v in seconds.items()}


# ------------------------------------------------------------------------------------------------
# What came out


def figures(judge: Path, rewriter: Path, result: Path) -> dict:
    out = {}
    for name, policy in (("cold", "base"), ("grpo", "method")):
        found = json.loads((judge / "summary.json").read_text())["policies"][policy]
        out |= {f"judge.{kind}.{name}": found[kind]["reward"] for kind in ("quality", "safety")}
        summary = json.loads((rewriter / "summary.json").read_text())
        texts, rows = summary["continuations"][policy]["safe"], summary["rows"]
        pairs = list(zip(texts, rows, strict=True))
        copied = [text.strip() == row["original"].strip() for text, row in pairs if row["safe"]]
        mended = [(text, row) for text, row in pairs if not row["safe"]]
        out[f"rewriter.copied.{name}"] = statistics.mean(copied)
        out[f"rewriter.safe.{name}"] = statistics.mean(safe(text) for text, _ in mended)
        better = [quality(r["prefix"], t) > quality(r["prefix"], r["original"]) for t, r in mended]
        out[f"rewriter.better.{name}"] = statistics.mean(better)
    policies = json.loads(result.read_text())["policies"]
    for name in ("base", "checkpoint"):
        for measure in ("quality", "safety", "factuality"):
            each = [cell[measure] for cell in policies[name].values()]
            out[f"policy.{measure}.{name}"] = statistics.mean(each)
    return out


def main():
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag.add_argument("--out", type=Path, default=Path("out/circle"))
    options = flag.parse_args()
    seeds = options.seeds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda seed: circle(options.out / f"seed{seed}", seed), seeds)
        found = dict(zip(seeds, each, strict=True))
    (options.out / "circle.json").write_text(json.dumps(found, indent=2) + "\n")
    print("| | mean | each seed |\n| --- | --- | --- |")
    for name in next(iter(found.values())):
        scale, digits = (1, 0) if name.startswith("seconds") else (100, 1)
        each = [scale * row[name] for row in found.values()]
        shown = ", ".join(f"{value:.{digits}f}" for value in each)
        print(f"| {name} | {statistics.mean(each):.{digits}f} | {shown} |")


if __name__ == "__main__":
    main()
