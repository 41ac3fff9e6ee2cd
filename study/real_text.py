"""Real English, real weights, a judge that is trained here: the method without an oracle.

    python -m study.real_text --text DOCUMENTS --start FOLDER [--out out/real_text]

In: documents, whatever data.py reads (tests/convert_brown.py makes some), and a small instructed
model, from which both the judge and the policy start; settings: configs/real_text.py. Stages, each
kept once it is finished, so that the same command goes on:

  1. pairs     an original continuation and a worse one, of each of KINDS
  2. judge     learns from pairs of the teacher split which letter names the original
  3. policy    self-improving pretraining on the train split, that judge served, its only teacher
  4. measures  both continue prefixes of the test split greedily: who wins by the judge, and what
               measures say that had no part in training

Out: OUT/report.md, figures and first continuations. The rule, written down before the first run: a
judge that finds the original in less than 75 % of the validation split's pairs, in the mean over
KINDS, is not good enough, and the trial ends there with that result.
"""

import argparse
import json
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

from data import Stream
from evaluation.evaluate import continue_batch
from model import load_model
from support import command
from support.command import ROOT, UserError, python
from support.files import markdown, read_jsonl, write_text
from support.settings import execute
from support.tokenizer import load_tokenizer
from teachers.serve import start_server
from tools.plot import read_json

KINDS = {  # what is worse than the original words: made of them, of another document's, a rollout's
    "another document's": lambda words, other, rollout, rng: other,
    "looped": lambda words, other, rollout, rng: (words[:4] * len(words))[: len(words)],
    "shuffled": lambda words, other, rollout, rng: rng.sample(words, len(words)),
    "halves swapped": lambda words, *_: words[len(words) // 2 :] + words[: len(words) // 2],
    "a rollout": lambda words, other, rollout, rng: rollout,
}
EPOCHS = {"teacher": 5, "validation": 1}  # how often a document of a split is cut anew
GOOD_ENOUGH = 0.75
GALLERY = 8


# ---- 1. Pairs -----------------------------------------------------------------------------------


def pairs(args, size: dict, split: str) -> Iterator[dict]:
    """Rows as teachers/tasks.py reads them: of a sample for training one kind, in turns; of one for
    validation each. The original is A or B by chance. Neither text has white space at its ends or
    a line's end, which would tell them apart."""
    tokenizer, policy = load_tokenizer(args.start), load_model(args.start)
    how = dict(batch_size=32, seed=args.seed, split=split, epochs=EPOCHS[split])
    for batch in Stream(args.text, tokenizer, **size, **how).batches():
        numbers, how, each = batch.index.tolist(), dict(temperature=1.0, seed=args.seed), [*KINDS]
        kinds = [each if split == "validation" else [each[n % len(each)]] for n in numbers]
        asked = [i for i, names in enumerate(kinds) if "a rollout" in names]
        fields = {name: getattr(batch, name)[asked] for name in ("prefix", "pad", "index")}
        drawn = continue_batch(policy, replace(batch, **fields), tokenizer, size["chunk"], **how)
        rollouts = dict(zip(asked, drawn, strict=True))
        for i, number in enumerate(numbers):
            texts = batch.suffix_text[i], batch.suffix_text[i - 1], rollouts.get(i, "")
            words, other, rollout = map(str.split, texts)
            for kind in kinds[i]:
                rng = random.Random(f"{args.seed}/{split}/{number}/{kind}")
                worse, label = KINDS[kind](words, other, rollout, rng), rng.choice("AB")
                if words and worse and worse != words:
                    a, b = map(" ".join, (words, worse) if label == "A" else (worse, words))
                    row = dict(task="quality", prefix=batch.prefix_text[i], a=a, b=b, label=label)
                    yield row | {"answer": label, "damage": kind}


def write_pairs(args, size: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, half in (("teacher", "train"), ("validation", "validation")):
        file = folder / f"pairs.{half}.jsonl"
        if not file.exists():
            print(f"pairs: {file}", flush=True)
            write_text(file, "".join(json.dumps(row) + "\n" for row in pairs(args, size, split)))
    return folder / "pairs.train.jsonl"


# ---- 2. to 4. -----------------------------------------------------------------------------------


def stage(made: Path, *words, **flags) -> dict:
    """A command of this repository, unless `made` is there. -> what that holds"""
    if not made.exists():
        print(f"{made.parent.name}: {made.parent}", flush=True)
        made.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        asked = python(*words, *(f"--{name}={value}" for name, value in flags.items()))
        if code := subprocess.run(asked).returncode:
            raise UserError(f"{made.parent.name} ended with code {code}; the same command goes on")
        print(f"{made.parent.name}: {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    return read_json(made)


def experiment(args) -> str:
    """All stages. -> the report"""
    shared, rows = execute(str(args.settings))
    out, settings = args.out.absolute(), shared | rows["policy"]
    size = {name: settings[name] for name in ("chunk", "max_seq")}
    made, how = write_pairs(args, size, out), dict(init_from=args.start, seed=args.seed)
    train = "teachers.train", "judge", f"{args.settings}:judge"
    answers = stage(out / "judge/summary.json", *train, data=made, out_dir=out / "judge", **how)
    told, share = accuracy(answers)
    if share < GOOD_ENOUGH:
        return f"{told}\n\nBelow {GOOD_ENOUGH:.0%}, so not good enough to teach: the trial ends.\n"
    with start_server(out / "judge" / "ckpt") as url:
        train, how = ("train", f"{args.settings}:policy"), dict(how, judge_url=url)
        stage(out / "policy/summary.json", *train, data=args.text, out_dir=out / "policy", **how)
        made, ours = out / "measures/evaluation.json", ("evaluation.evaluate", out / "policy/ckpt")
        how = dict(size, baseline=args.start, data=args.text, split="test", suite="quality")
        how |= {name: settings[name] for name in ("prompts", "judge_max_tokens")}
        result = stage(made, *ours, judge_url=url, out=made, **how)
    lines = list(read_jsonl(made.parent / "generations.jsonl"))
    prefixes = [p for line in lines if line["checkpoint"] == args.start for p in line["prefixes"]]
    return f"{told}\n\n{measures(result)}\n\n{gallery(result, prefixes)}"


# ---- What came out ------------------------------------------------------------------------------


def accuracy(answers: dict) -> tuple[str, float]:
    """A table, and the mean over KINDS: how often the trained judge named the original."""
    found, right = defaultdict(list), answers["values"]["method"]["quality"]["reward"]
    for row, value in zip(answers["rows"], right, strict=True):
        found[row["damage"]].append(value)
    lines = [["the worse continuation", "pairs", "the judge names the original, %"]]
    lines += [[kind, len(each), f"{100 * mean(each):.1f}"] for kind, each in found.items()]
    share = mean(map(mean, found.values()))
    return markdown([*lines, ["mean", len(right), f"{100 * share:.1f}"]]), share


def distinct(texts: list[str], n: int) -> float:
    """The share of different ones among all sequences of n words; 1 where there are none."""
    found = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(found)) / len(found) if found else 1.0


def of_both(found: dict) -> list:
    """What an evaluation found of the start and of the policy, on its one kind of prefix."""
    return [next(iter(found[name].values())) for name in ("base", "checkpoint")]


def measures(result: dict) -> str:
    """A table: what the judge says of both, and what had no part in training."""
    cells, texts = of_both(result["policies"]), of_both(result["continuations"])
    low, high = (100 * bound for bound in cells[1]["interval"]["quality"])
    wins = f"{100 * cells[1]['quality']:.1f} ({low:.1f} to {high:.1f})"
    of_texts = {
        "repeated triples of words in a continuation, %": lambda t: (
            100 * mean(1 - distinct([text], 3) for text in t)
        ),
        "different among all pairs of words, %": lambda t: 100 * distinct(t, 2),
        "different among all triples, %": lambda t: 100 * distinct(t, 3),
        "words a continuation": lambda t: mean(len(text.split()) for text in t),
    }
    lines = [[f"{len(texts[0])} prefixes", "start", "policy"], ["wins by the judge, %", "50", wins]]
    lines += [[name, *(f"{value(t):.1f}" for t in texts)] for name, value in of_texts.items()]
    nll = [f"{cell['nll']:.3f}" for cell in cells]
    lines.append(["NLL of the originals, nats a token", *nll])
    return markdown([*lines, ["KL from the start, nats a token", "0", f"{cells[1]['kl']:.4f}"]])


def gallery(result: dict, prefixes: list[str]) -> str:
    """The first prefixes' ends, and how both go on."""
    shown, texts = [], of_both(result["continuations"])
    for each in list(zip(prefixes, *texts, strict=True))[:GALLERY]:
        prefix, *texts = (" ".join(text.split()) for text in each)
        shown += [f"...{prefix[-160:]}", *map("  {} | {}".format, ("start ", "policy"), texts), ""]
    return "\n".join(["```text", *shown[:-1], "```"])


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--text", required=True, help="documents, as train.py's data")
    flag.add_argument("--start", required=True, help="Hugging Face folder of a small chat model")
    flag.add_argument("--out", type=Path, default=Path("out/real_text"))
    flag.add_argument("--seed", type=int, default=0)
    flag.add_argument("--settings", type=Path, default=ROOT / "configs" / "real_text.py")
    args = flag.parse_args(arguments)
    report = experiment(args)
    write_text(args.out / "report.md", report)
    print(f"\n{report}\n{args.out / 'report.md'}")


if __name__ == "__main__":
    command.run(main)
