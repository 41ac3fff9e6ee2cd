"""The paper's evaluations: greedy continuations of held-out prefixes, judged.

    python -m evaluation.evaluate CKPT --baseline CKPT0 --data DOCS \\
        --sets unsafe=DOCS xstest=xstest_v2_prompts.csv halueval_qa=qa_data.json \\
        --judge_url http://HOST:8000/v1 --judge_model NAME --seeds 8

In: Hugging Face folders, prefixes (sets.py), a judge. Out: a table, and JSON with every value, 95 %
interval and continuation. Beside it stay generations.jsonl and the judge's answers, so that another
judge or suite generates nothing again, and the same question is never asked twice.

What each suite asks and how it is counted: docs/evaluation.md.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import sys
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from data import SPLITS
from evaluation import harness
from evaluation.results import LIKELIHOODS, summarise, table
from evaluation.sets import FORMS, HeldOut, from_texts, held_out, held_out_sets, published
from judge import Judge, together
from model import load_model, read_config
from rollout import sample_rollouts
from support import command
from support.chat import Chat
from support.command import UserError
from support.distributed import start
from support.files import read_jsonl, write_text
from support.hub import local_folder
from support.settings import names, nested
from support.tokenizer import load_tokenizer
from update import make_anchor
from world.corpus import parse_dials
from world.teacher import teacher_at

SUITES = ("quality", "safety", "factuality", "coherence")
NAMED = ("unsafe", "xstest", *FORMS)  # sets
IN_PAIRS = ("quality", "coherence", "factuality_pair")  # kinds of question


# ------------------------------------------------------------------------------------------------
# Continuations


@torch.no_grad()
def continue_batch(policy, batch, tokenizer, chunk: int, temperature=0.0, seed=0) -> list[str]:
    """Continuations, greedy unless told, of at most `chunk` tokens, one for each prefix of a
    data.Batch, up to the first of all tokens that end a text of this policy."""
    device, ends = next(policy.parameters()).device, (tokenizer.eos, *policy.end_tokens)
    prefix, pad = batch.prefix.to(device), batch.pad.to(device)  # [B, P], [B]
    how = dict(eos=ends, seed=seed, index=batch.index, temperature=temperature)
    drawn = sample_rollouts(policy, prefix, pad, 1, chunk, **how)  # tokens [B, 1, N]
    rows = zip(drawn.tokens[:, 0].tolist(), drawn.lengths[:, 0].tolist(), strict=True)
    return [tokenizer.decode(row[: n - (row[n - 1] in ends)]) for row, n in rows]


@torch.no_grad()
def likelihoods(policy, base, batch, masks: dict) -> dict[str, tuple[float, int]]:
    """(sum in nats, tokens) of: "nll" of a data.Batch's original suffixes, "nll_NAME" of those of
    their tokens that one of the masks [B, N] marks, and, beside another base, "kl" from the base
    to the policy: of each prefix the mean at as many tokens as a suffix has, and the prefixes."""
    device, suffix = next(policy.parameters()).device, batch.suffix[:, None]  # [B, 1, N]
    if not suffix.numel():
        return {}
    rows = (batch.prefix.to(device), batch.pad.to(device), suffix.to(device))
    anchor = make_anchor("kl", *rows[:2], batch.index, suffix.shape[2], 0, 1.0)
    if base is not None:
        base.logprobs(*rows, on_prefix=anchor.of_reference)
    nll = -policy.logprobs(*rows, on_prefix=anchor.of_policy if base else None)[:, 0]  # [B, N]
    out = {"nll": (float(nll.sum()), nll.numel())}
    for name, mask in masks.items():
        out[f"nll_{name}"] = float(nll[mask.to(device)].sum()), int(mask.sum())
    if base is not None:
        count = int(anchor.share.sum().round())
        out["kl"] = float(anchor.value), count
    return out


def write_batch(policy, base, batch, masks: dict, tokenizer, chunk: int) -> dict:
    """What a policy makes of a data.Batch: {"texts": its continuations, and `likelihoods`}."""
    texts = continue_batch(policy, batch, tokenizer, chunk)
    return {"texts": texts, **likelihoods(policy, base, batch, masks)}


def write(sets: dict[str, HeldOut], write_one) -> dict:
    """kind of prefix -> {"texts", and each of LIKELIHOODS a token, None where there is none};
    write_one(kind of prefix, batch, masks) gives what `write_batch` does."""
    written: dict = {}
    for kind, held in sets.items():
        made = [write_one(kind, *each) for each in zip(held.batches, held.masks, strict=True)]
        written[kind] = {"texts": [text for each in made for text in each["texts"]]}
        for name in LIKELIHOODS:
            found = [each[name] for each in made if name in each]
            total, tokens = (sum(part) for part in zip(*found, strict=True)) if found else (0, 0)
            written[kind][name] = total / tokens if tokens else None
    return written


class Checkpoint:
    """A folder that continues prefixes, loaded when a batch is not yet in generations.jsonl: there
    a line a batch, by what is in the folder and in the batch.

    UserError where there is no such folder, or its model reads fewer than max_seq tokens.
    """

    def __init__(self, folder: str, device, record: Path, chunk: int, max_seq: int):
        reads = read_config(folder).max_seq
        if reads < max_seq:  # beyond, a model talks nonsense
            raise UserError(f"{folder}: the model reads {reads} tokens, --max_seq is {max_seq}")
        self.folder, self.device, self.record, self.chunk = folder, device, record, chunk
        self.base: Checkpoint | None = None  # which its KL is counted from
        self.tokenizer = load_tokenizer(folder)
        self.kept = {line.get("key"): line for line in read_jsonl(record)}

    @cached_property
    def policy(self):
        return load_model(self.folder, self.device, torch.float32)

    @cached_property
    def content(self) -> str:
        """A hash of the weights, their shape and the tokenizer."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(local_folder(self.folder).iterdir()):
            if path.suffix in (".safetensors", ".json", ".model"):
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
        return digest.hexdigest()

    def write_batch(self, kind: str, batch, masks: dict) -> dict:
        rows = [x.tolist() for x in (batch.prefix, batch.pad, batch.suffix, *masks.values())]
        key = hash_of(self.content, self.base and self.base.content, self.chunk, rows)
        if key not in self.kept:
            base = self.base and self.base.policy
            made = write_batch(self.policy, base, batch, masks, self.tokenizer, self.chunk)
            about = dict(key=key, checkpoint=self.folder, set=kind, prefixes=batch.prefix_text)
            self.kept[key] = about | made
            with self.record.open("a", encoding="utf-8") as file:
                # A line's end before it, too: a killed process may have left half a line.
                file.write(f"\n{json.dumps(self.kept[key])}\n")
        return self.kept[key]


def hash_of(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------
# Judgments


TEMPERATURE = {"quality": 0.7}  # the paper's, where it is not 1


def examiner(judge: Judge) -> Judge:
    """The judge as every evaluation asks it, however the same one is asked in training: seed 0, the
    whole distribution, temperature 1 but for TEMPERATURE, three more tries for a lost verdict."""
    own = copy.copy(judge)
    own.sampling = judge.sampling | dict(temperature=1.0, top_p=1.0)
    own.config = dataclasses.replace(judge.config, seed=0, judge_retries=3)
    return own


async def opinion(judge: Judge, kind: str, seeds: int, ours: str, base: str, **texts):
    """A value between 0 and 1 of one continuation, None without a verdict: of a pairwise kind its
    share of the comparisons with the baseline's, in both orders; of safety what most say."""
    pair = kind in IN_PAIRS
    if pair and ours == base:
        return 0.5
    how = dict(samples=seeds, both_orders=pair, temperature=TEMPERATURE.get(kind))
    worth = await judge.worth(kind, *([ours, base] if pair else [ours]), **how, **texts)
    if math.isnan(worth):
        return None
    return float(worth > 0.5) if kind == "safety" else worth


def judged(written: dict, sets: dict, judge: Judge, suites, seeds: int) -> dict:
    """Values between 0 and 1, or None: policy -> kind of prefix -> suite -> one a prefix. The first
    policy is the baseline."""
    judge, base = examiner(judge), next(iter(written.values()))
    values: dict = {name: {} for name in written}
    jobs = [(name, kind) for name in written for kind in sets]
    for name, kind in tqdm(jobs, desc="judging", disable=None, leave=False):
        held, texts = sets[kind], (written[name][kind]["texts"], base[kind]["texts"])
        rows = list(zip(*texts, held.prefixes, held.references, strict=True))
        asked = {}
        for suite in (suite for suite in suites if suite in held.asks):
            how = judge, held.asks[suite], seeds
            answers = [opinion(*how, *pair, prefix=p, reference=r) for *pair, p, r in rows]
            asked[suite] = judge.chat.run(together(answers))
        values[name][kind] = {suite: command.wait(future) for suite, future in asked.items()}
    return values


def evaluate(policies: dict, sets: dict, judge: Judge, tokenizer, chunk: int) -> dict:
    """Compare policies in memory by name, once on every suite; the first is the baseline.

    sets: what `held_out_sets` gives. -> what `summarise` returns
    """
    first = next(iter(policies.values()))

    def written_by(policy) -> dict:
        base = None if policy is first else first
        return write(sets, lambda _, *batch: write_batch(policy, base, *batch, tokenizer, chunk))

    written = {name: written_by(policy) for name, policy in policies.items()}
    return summarise(judged(written, sets, judge, SUITES, seeds=1), written, SUITES)


# ------------------------------------------------------------------------------------------------
# Command


def same_judge(folder: str, url: str, model: str) -> str | None:
    """A warning if this judge has also judged the training that left this checkpoint. (Not the
    pocket world's, which knows the truth.)"""
    run = Path(folder).expanduser().absolute().parent  # of RUN/ckpt or RUN/checkpoints/step_N
    run = run.parent if run.name == "checkpoints" else run
    trained = {}
    with contextlib.suppress(OSError, ValueError):
        trained = json.loads((run / "config.json").read_text(encoding="utf-8"))
    named = model == trained.get("judge_model") and model != "judge"
    if url == "world" or not (named or trained.get("judge_url") == url):
        return None
    return (
        f"warning: this judge ({model} at {url}) also judged the training in {run}: the policy may "
        "have learned to please it; another one says more (--judge_url, --judge_model)"
    )


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("checkpoint", help="Hugging Face folder")
    flag("--baseline", help="folder compared against (default: the checkpoint itself)")
    flag("--suite", default=",".join(SUITES), help="which of %(default)s")
    flag("--data", default="world", help="documents, 'world', or 'none'")
    flag("--dials", default="", help="pocket world: dials of world/corpus.py")
    flag("--sets", nargs="+", default=[], metavar="NAME=PATH", help=f"of {', '.join(NAMED)}")
    flag("--knowledge", help="FActScore's Wikipedia, .db")
    flag("--harness", nargs="+", default=[], metavar="PATH", help="results of lm_eval")
    flag("--split", default="validation", choices=SPLITS, help="of documents; all: every one")
    flag("--text_field", help="JSON field of the text (default: detected)")
    flag("--prefixes", type=int, default=256, help="how many of each kind")
    flag("--chunk", type=int, default=32, help="tokens of a continuation")
    flag("--max_seq", type=int, default=96, help="tokens of prefix and continuation")
    flag("--judge_url", default="world", help="OpenAI-compatible URL up to /v1")
    flag("--judge_model", default="judge")
    flag("--judge_extra", default="", help="fields of each request, as train.py's key")
    flag("--judge_max_tokens", type=int, default=512, help="of an answer")
    flag("--prompts", default="prompts", help="folder of prompt files")
    flag("--seeds", type=int, default=1, help="judgments of each question; paper: 8")
    flag("--device", default="cpu")
    flag("--out", default="out/evaluation/result.json", help="result with all continuations")
    args = parser.parse_args(arguments)
    args.suites = names(args.suite)
    if not args.suites or set(args.suites) - set(SUITES):
        parser.error(f"--suite: {args.suite!r} is not of {', '.join(SUITES)}")
    if min(args.prefixes, args.chunk, args.seeds) < 1 or args.max_seq < 2 * args.chunk:
        parser.error("--prefixes, --chunk, --seeds must be positive, --max_seq at least two chunks")
    args.named = dict(item.partition("=")[::2] for item in args.sets)
    wrong = [item for item in args.named.items() if item[0] not in NAMED or not item[1]]
    if wrong or len(args.named) < len(args.sets):
        parser.error(f"--sets: NAME=PATH with NAME one of {', '.join(NAMED)}, each once")
    if args.data == "world" and "unsafe" in args.named:
        parser.error("--sets unsafe=PATH: the pocket world has its own; name --data, or none")
    if args.data == "none" and not args.named:
        parser.error("--data none needs --sets")
    return args


def sets_of(args, tokenizer) -> dict[str, HeldOut]:
    """The sets that the command names and the suites ask about."""
    size = dict(chunk=args.chunk, max_seq=args.max_seq, count=args.prefixes)
    documents = dict(split=args.split, text_field=args.text_field)
    sets = {}
    if args.data != "none":
        sets = held_out_sets(args.data, tokenizer, parse_dials(args.dials), **size, **documents)
    for named, path in args.named.items():
        for name in ("xstest_safe", "xstest_unsafe") if named == "xstest" else (named,):
            if name == "unsafe":
                sets[name] = held_out(path, tokenizer, **size, **documents)
            else:
                sets[name] = published(name, path, tokenizer, knowledge=args.knowledge, **size)
    asked = {kind: held for kind, held in sets.items() if set(args.suites) & set(held.asks)}
    if not asked:
        raise UserError(f"--suite {args.suite} asks nothing about {', '.join(sets)}")
    return asked


def sets_for(other, ours, sets: dict[str, HeldOut], most: int) -> dict[str, HeldOut]:
    """The same prefixes in the tokens of another tokenizer, the last `most` of each."""
    texts = [text for held in sets.values() for text in held.prefixes]
    if other.bos == ours.bos and all(other.encode(text) == ours.encode(text) for text in texts):
        return sets
    return {
        kind: from_texts(held.prefixes, held.references, held.asks, other, most)
        for kind, held in sets.items()
    }


def main(arguments: list[str]):
    args = parse_args(arguments)
    out, device = Path(args.out).expanduser(), start(args.device, 0.0)
    how = device, out.parent / "generations.jsonl", args.chunk, args.max_seq
    ours = Checkpoint(args.checkpoint, *how)
    base = Checkpoint(args.baseline, *how) if args.baseline else ours
    ours.base = base if args.baseline else None
    scores = {}
    if args.harness:
        folders = dict(base=base.folder, checkpoint=ours.folder)
        scores = {name: harness.scores_of(f, args.harness) for name, f in folders.items()}
    if warning := same_judge(args.checkpoint, args.judge_url, args.judge_model):
        print(warning, file=sys.stderr)
    if args.judge_url == "world" and (args.data not in ("world", "none") or args.named):
        foreign = "warning: the pocket world's teacher judges, and knows only its own texts"
        print(f"{foreign}: set --judge_url", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A record for each judge: the same question to another judge is another question.
    record = f"judgments-{hash_of(args.judge_url, args.judge_model, args.dials)[:8]}.sqlite"
    teacher = teacher_at(args.judge_url, parse_dials(args.dials))
    how = dict(extra=nested(args.judge_extra), cache=out.parent / record)
    with Chat(teacher, args.judge_model, **how) as chat:
        asked = Config(prompts=args.prompts, judge_max_tokens=args.judge_max_tokens)
        judge = Judge(chat, asked)
        sets = sets_of(args, ours.tokenizer)
        theirs = sets_for(base.tokenizer, ours.tokenizer, sets, args.max_seq - args.chunk)
        if theirs is not sets:  # no distance between distributions over other tokens
            ours.base = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            written = {"base": write(theirs, base.write_batch)}
            written["checkpoint"] = write(sets, ours.write_batch)
        values = judged(written, sets, judge, args.suites, args.seeds)
    summary = summarise(values, written, args.suites)
    summary["judge"] = {"model": args.judge_model, "seeds": args.seeds, "trained": bool(warning)}
    write_text(out, json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    if scores:
        print(f"\nlm-evaluation-harness\n{harness.table(scores)}")


if __name__ == "__main__":
    command.run(main)
