"""What the loop of train.py needs to train a teacher: a prompt is the prefix, answers continue it.

In: rows that teachers/sets.py made (JSON objects, one a line), whose "task" is their kind, and the
prompts that the finished teacher will be asked with. Out: `TaskStream`, the batches of prompts;
`score_answers`, the scorer; and `evaluate_answers` to held-out rows.

    judge      1 for an answer whose verdict is the row's label, else 0 (paper, section 3)
    rewriter   safe suffix: 1 for an exact copy, else 0; unsafe suffix: half its quality against the
               original and half its safety, by the run's judge, mean over judge_samples

A row may hold an "answer", which objective=nll with candidates=suffix learns from: a cold start.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice

import numpy as np
import torch

from candidates import autocast
from config import Config
from data import OTHERS, Batch, Stream, digest
from evaluation.evaluate import continue_batch
from evaluation.results import summarise
from judge import Judge, Scores, load_prompts, render, together
from rewrite import clean, last_five_words
from support.command import UserError, wait
from support.hub import local_folder
from support.sources import Skips, list_files, records
from teachers.template import Template
from verdicts import VERDICTS, parse

# The texts that the prompt of a kind of row shows, and the kinds that each teacher learns from.
SHOWN = {"quality": ("prefix", "a", "b"), "safety": ("text",), "rewrite": ("prefix", "original")}
KINDS = {"judge": ("quality", "safety"), "rewriter": ("rewrite",)}


class Rows:
    """A teacher's rows, held in memory; `documents` as data.Stream asks for them.

    UserError where a row is of another kind, lacks a text or has no label, naming file and line."""

    def __init__(self, source: str, teacher: str):
        self.rows, skips = [], Skips()
        files = list_files(source)
        skips.shards = len(files)
        for name in files:
            for line, row in records(name, skips):
                if wrong := fault(row, teacher):
                    raise UserError(f"{name}:{line}: {wrong}")
                self.rows.append(json.dumps(row))
        if not self.rows:
            raise UserError(f"{source} holds no rows: python -m teachers.sets makes some")
        self.rows.sort(key=digest)  # mixes the files: a window of the stream's shuffle may be small

    def documents(self, start: dict | None) -> Iterator[tuple[str, dict]]:
        for number in range(start["row"] if start else 0, len(self.rows)):
            yield self.rows[number], {"row": number + 1}


def fault(row: dict, teacher: str) -> str:
    """What is wrong with a row, "" if nothing."""
    kind, kinds = row.get("task"), KINDS[teacher]
    if kind not in kinds:
        return f"a {teacher} learns from rows of task {' or '.join(kinds)}, not {kind!r}"
    texts = [*SHOWN[kind], *(["answer"] if "answer" in row else [])]
    if lacking := [name for name in texts if not isinstance(row.get(name), str)]:
        return f"the row has no text {', '.join(map(repr, lacking))}"
    if kind == "rewrite":
        return "" if isinstance(row.get("safe"), bool) else "'safe' must be true or false"
    labels = f"label {row.get('label')!r} is none of {', '.join(VERDICTS[kind])}"
    return "" if row.get("label") in VERDICTS[kind] else labels


def prompt_of(row: dict, prompts: dict) -> str:
    """What a served teacher would be asked about the row."""
    texts = {name: row[name] for name in SHOWN[row["task"]]}
    if row["task"] == "rewrite":
        texts["last_words"] = last_five_words(row["prefix"])
    return render(prompts[row["task"]], **texts)


def answer_of(row: dict) -> str:
    if "answer" in row:
        return row["answer"]
    return row["original"] if row["task"] == "rewrite" else f"VERDICT: {row['label']}"


class TaskStream(Stream):
    """Batches of prompts: prefix = the prompt as serve.py lays it out by the chat template of
    `folder`, suffix = the supervised answer, ended by eos; eos alone unless `supervised`."""

    def __init__(self, source, tokenizer, *, prompts, folder: str, supervised: bool, **how):
        super().__init__(source, tokenizer, **how)
        self.supervised = supervised
        self.prompts = load_prompts(prompts)
        self.template = Template(local_folder(folder, weights=False), tokenizer)

    def sample(self, text: str, epoch: int, mine: bool):
        row = json.loads(text)
        prompt = {"role": "user", "content": prompt_of(row, self.prompts)}
        ids = self.template.encode([prompt])
        answer = self.tokenizer.encode(answer_of(row)) if self.supervised else []
        answer = [*answer, self.tokenizer.eos]
        if len(ids) > self.max_seq - self.chunk or len(answer) > self.chunk:
            self.skipped["a prompt above max_seq - chunk or an answer above chunk tokens"] += 1
            return None
        if not mine:
            return OTHERS
        return ids, answer + [self.tokenizer.eos] * (self.chunk - len(answer)), row

    def surely_long(self, text: str) -> bool:
        return False  # whether a row is skipped shows when it is tokenised, on every rank

    def collate(self, rows: list, state: dict) -> Batch:
        batch = super().collate([row[:3] for row in rows], state)
        batch.rows = [row[3] for row in rows]
        return batch


# ---- Rewards ------------------------------------------------------------------------------------


def score_answers(judge: Judge, rows: list[dict], texts: list[list[str]], C: int) -> Future:
    """rows [B], texts [B][C] -> Future of Scores. Its by_kind holds the reward by kind of row and,
    under dotted names, what it was made of; nan where a row is of another kind. The judge is asked
    about rewrites of unsafe suffixes alone."""

    async def score() -> Scores:
        tally: Counter = Counter()
        each = [[reward_of(judge, row, text, tally) for text in t] for row, t in pairs]
        found = await together(map(together, each))  # [B][C] of {name: value}
        names = sorted({name for row in found for parts in row for name in parts})
        by_kind = {
            name: np.array([[parts.get(name, np.nan) for parts in row] for row in found])  # [B, C]
            for name in names
        }
        reward = np.full((len(rows), C), np.nan)  # [B, C]
        for name, values in by_kind.items():
            if "." not in name:  # a row is of one kind
                reward = np.where(np.isnan(values), reward, values)
        examples = [
            dict(kind=row["task"], candidates=[text], verdict=value, answer=text)
            for (row, answers), values in zip(pairs[:1], reward[:1], strict=True)
            for text, value in zip(answers, values, strict=True)
        ]
        return Scores(reward, by_kind, *(tally[n] for n in ("calls", "failed", "absent")), examples)

    pairs = list(zip(rows, texts, strict=True))
    return judge.chat.run(score())


async def reward_of(judge: Judge, row: dict, text: str, tally: Counter) -> dict[str, float]:
    """The reward of one answer under the name of its kind, and its parts."""
    kind, original = row["task"], row.get("original", "")
    if kind != "rewrite":
        label = parse(kind, text)
        return {kind: float(label == row["label"]), f"{kind}.readable": float(label is not None)}
    passage = clean(text, row["prefix"], original)
    if row["safe"]:
        return {"safe": float(passage == original), "safe.overlap": overlap(passage, original)}
    quality = safety = 0.0  # of a refusal, or nothing
    if passage is not None:
        how = dict(samples=judge.config.judge_samples, tally=tally)
        pair = judge.worth("quality", passage, original, prefix=row["prefix"], **how)
        quality, safety = await together([pair, judge.worth("safety", passage, **how)])
    kept = {"unsafe.overlap": overlap(passage, original)}
    if np.isnan(quality + safety):
        return kept  # no verdict, no reward
    parts = {"unsafe.quality": quality, "unsafe.safety": safety}
    return kept | {"unsafe": (quality + safety) / 2} | parts


def overlap(passage: str | None, original: str) -> float:
    """Share of the original's words that the passage keeps, however ordered (paper, figure 7)."""
    words, kept = Counter(original.split()), Counter((passage or "").split())
    return (words & kept).total() / max(words.total(), 1)


# ---- Evaluation ---------------------------------------------------------------------------------


def held_out_stream(config: Config, teacher: str, tokenizer) -> TaskStream:
    """The rows that teachers/sets.py wrote to *.validation.jsonl.zst beside *.train.jsonl.zst."""
    if not all(".train." in name for name in config.data.split(",")):
        raise UserError(
            f"data={config.data}: the evaluation of a teacher reads the file named .validation. "
            f"beside each file named .train.; rename it, or set eval_prefixes=0"
        )
    rows = Rows(config.data.replace(".train.", ".validation."), teacher)
    size = dict(chunk=config.chunk, max_seq=config.max_seq, epochs=1)
    size["batch_size"] = min(64, config.eval_prefixes)
    how = dict(prompts=config.prompts, folder=config.init_from, supervised=False)
    return TaskStream(rows, tokenizer, **size, **how)


@torch.no_grad()
def evaluate_answers(policies: dict, stream, judge: Judge, tokenizer, config: Config):
    """Greedy answers to the first eval_prefixes rows of the stream, sampled in the arithmetic of
    the training. -> what evaluation.results.summarise gives, and the rows."""
    batches = list(islice(stream.batches(), math.ceil(config.eval_prefixes / stream.batch_size)))
    rows = [row for batch in batches for row in batch.rows][: config.eval_prefixes]
    values, written = {}, {}
    for name, policy in policies.items():
        with autocast(config, next(policy.parameters()).device):
            texts = [t for b in batches for t in continue_batch(policy, b, tokenizer, config.chunk)]
        texts = texts[: len(rows)]
        scores = wait(score_answers(judge, rows, [[text] for text in texts], 1))
        values[name] = {}
        for measure, column in scores.by_kind.items():  # [B, 1]
            kind, _, part = measure.partition(".")
            found = [None if np.isnan(value) else value for value in column[:, 0].tolist()]
            values[name].setdefault(kind, {})[part or "reward"] = found
        written[name] = dict.fromkeys(values[name], {"texts": texts})
    kinds = [kind for row in values.values() for kind in row.values()]
    suites = list(dict.fromkeys(part for kind in kinds for part in kind))
    return summarise(values, written, suites) | {"rows": rows}
