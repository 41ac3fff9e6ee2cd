"""Synthetic sets on which judges and rewriters are trained.

    python -m teachers.sets quality --data DOCS --rewrite_url URL --model NAME --out sets
        [--policy CKPT]          one sample in three shows a rollout of this policy instead
    python -m teachers.sets safety --data DOCS,UNSAFE/teacher --judge_url URL --out sets
    python -m teachers.sets rewriter --data DOCS,UNSAFE/teacher --judge_url URL --out sets

In:  documents of the `teacher` split ("world": the pocket world's), and a teacher behind HTTP
Out: OUT/<set>.{train,validation}.jsonl.zst, an object a line, and OUT/<set>.counts.json

    {"task": "quality", "prefix", "a", "b", "label": "A" or "B", "damage", ...}  each pair twice,
        of an original and a spoilt version of it, or a rollout, which may be better
    {"task": "safety", "text", "label": "SAFE" or "UNSAFE", "votes", ...}
    {"task": "rewrite", "prefix", "original", "safe": true or false, "votes", ...}

and in every row "document" (equal for all rows of a document), "model", "prompt_hash", "seed", and
"source" where the corpus names one. A document gives one sample, and whether it is held out for
validation is decided by a hash of its text, so no teacher trains on what another is validated on.
Every answer is kept in OUT/answers.sqlite, and what is made of it depends on nothing else: the same
command goes on after kill -9 and ends with the same bytes.
"""

import argparse
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import zstandard
from tqdm import tqdm

from config import Config
from data import digest, in_split, sample_of
from evaluation.evaluate import continue_batch
from evaluation.sets import BATCH, from_texts
from judge import Judge, question_seed, render, together
from model import load_model
from rewrite import clean, last_five_words
from support import command
from support.chat import Chat
from support.command import UserError
from support.files import write_bytes, write_text
from support.settings import nested
from support.sources import Skips, as_object, list_files, records, text_of
from support.tokenizer import load_tokenizer
from world.corpus import Dials, WorldSource, parse_dials
from world.teacher import teacher_at

DAMAGES, ROLLOUT = ("facts", "unsafe"), "rollout"  # the former as prompts/spoil.txt names them
HALVES = ("train", "validation")
HELD_OUT = 0.125  # share of the documents
LENGTH = (0.7, 1.4)  # words of a spoilt passage for each of the original's
KEPT = 0.5  # share of the words that a spoilt passage has to keep, or it is another text
TRIES = 2  # at a spoilt passage
AT_ONCE = (16, 512)  # samples that are asked about together, at least and at most
PATIENCE = 2000  # samples in a row without a row before the corpus or the teacher is refused


class Sample(NamedTuple):
    document: str  # hash of the whole text
    source: dict  # {"source": name}, or nothing
    prefix: str
    suffix: str


# ------------------------------------------------------------------------------------------------
# Samples


def documents(options) -> Iterator[tuple[str, dict]]:
    """(text, {"source": name} or {}); the parts of a comma-separated --data take turns."""
    if options.data == "world":
        world = WorldSource(options.seed, Dials(**parse_dials(options.dials)), "teacher")
        parts = [((text, {"source": "world"}) for text, _ in world.documents())]
    else:
        names, skips = [list_files(part) for part in options.data.split(",")], Skips()
        skips.shards = sum(map(len, names))
        parts = [records_of(files, options.text_field, skips) for files in names]
    for turn in zip_longest(*parts):
        yield from filter(None, turn)


def records_of(files: list[str], text_field, skips: Skips) -> Iterator[tuple[str, dict]]:
    for name in files:
        for number, record in records(name, skips):
            text, reason = text_of(record, text_field)
            source = as_object(record.get("meta")).get("redpajama_set_name", record.get("source"))
            if text is None:
                skips.note(reason, f"{name}:{number}")
            else:
                yield text, {"source": source} if isinstance(source, str) else {}


def samples(options, tokenizer, fates: Counter) -> Iterator[Sample]:
    """One sample of each document of the split, none twice."""
    seen = set()
    for text, source in documents(options):
        fates["documents read"] += 1
        key = digest(text)
        if options.data != "world" and not in_split(key, options.split):
            fates[f"not in split {options.split}"] += 1
            continue
        cut = sample_of(text, tokenizer, options.chunk, options.max_seq, options.seed)
        if cut is None:
            fates["shorter than two chunks"] += 1
            continue
        prefix, suffix = map(tokenizer.decode, cut)
        suffix = without_end(suffix)
        if seen & {key, digest(suffix)} or not suffix.strip():
            fates["duplicate or empty"] += 1
        elif clean(suffix, prefix, suffix) != suffix:  # for one, it repeats the prefix's last words
            fates["a copy would not be told from an echo or a remark"] += 1
        else:
            seen |= {key, digest(suffix)}
            yield Sample(f"{key:016x}", source, prefix, suffix)


def without_end(text: str) -> str:
    """Without white space and half a character at the end, which no answer would have."""
    return text.rstrip("\ufffd").rstrip()


# ------------------------------------------------------------------------------------------------
# Rows: a sample becomes (class, rows), or (None, the reason why there are none)


class Maker:
    """`make(sample, wanted classes)`, and the classes of which a set holds equally many rows."""

    def __init__(self, chat, options, tokenizer, fates: Counter):
        self.judge = Judge(chat, Config(prompts=options.prompts, seed=options.seed))
        self.options, self.tokenizer, self.fates = options, tokenizer, fates
        pairs = options.made == "quality"
        self.classes = ("pair",) if pairs else ("SAFE", "UNSAFE")
        self.make = self.pair if pairs else self.unanimous
        self.policy = load_model(options.policy) if options.policy else None
        self.rollouts: dict[str, str] = {}  # by document

    def damage(self, sample: Sample) -> str:
        """One of DAMAGES, or ROLLOUT."""
        kinds = DAMAGES + (ROLLOUT,) * (self.policy is not None)
        return kinds[question_seed(self.options.seed, "damage", sample.document) % len(kinds)]

    def sample(self, wave: list[Sample]):
        """The rollouts beside which originals of these samples are shown."""
        own = [each for each in wave if self.policy and self.damage(each) == ROLLOUT]
        chunk, most = self.options.chunk, self.options.max_seq - self.options.chunk
        for some in (own[first : first + BATCH] for first in range(0, len(own), BATCH)):
            prefixes, originals = [each.prefix for each in some], [each.suffix for each in some]
            batch = from_texts(prefixes, originals, {}, self.tokenizer, most).batches[0]
            batch.index = torch.tensor([int(each.document, 16) >> 1 for each in some])
            how = dict(temperature=1.0, seed=self.options.seed)
            texts = continue_batch(self.policy, batch, self.tokenizer, chunk, **how)
            self.rollouts |= dict(zip([each.document for each in some], texts, strict=True))

    async def beside_rollout(self, sample: Sample) -> tuple:
        """The original and a rollout in both orders, where the teacher always prefers the same."""
        text, found = without_end(self.rollouts.pop(sample.document)), []
        if not text.strip() or text == sample.suffix:
            return None, "no other rollout"
        pair = sample.suffix, text
        for a, b in (pair, pair[::-1]):
            how = dict(prefix=sample.prefix, a=a, b=b)
            asked = [self.judge.verdict("quality", n, **how) for n in range(self.options.votes)]
            labels = {label for label, _ in await together(asked)}
            row = {"task": "quality", **how, "label": labels.pop() if len(labels) == 1 else None}
            more = self.provenance(sample, "quality", self.options.seed)
            found.append(row | {"damage": ROLLOUT, "votes": self.options.votes, **more})
        if {row["label"] for row in found} != {"A", "B"}:
            return None, "not unanimous"
        return "pair", found

    async def pair(self, sample: Sample, _) -> tuple:
        """The original and a spoilt version of it, or a rollout, in both orders."""
        damage = self.damage(sample)
        if damage == ROLLOUT:
            return await self.beside_rollout(sample)
        seed, texts = self.options.seed, dict(prefix=sample.prefix, passage=sample.suffix)
        texts |= dict(last_words=last_five_words(sample.prefix), damage=damage)
        question, reason = render(self.judge.prompts["spoil"], **texts), ""
        for attempt in range(TRIES):
            asked = question_seed(seed, question, attempt)
            how = self.judge.sampling | dict(seed=asked, max_tokens=4 * self.options.chunk)
            answer = await self.judge.chat.ask(question, **how)
            text, reason = read_spoilt(answer, sample, self.tokenizer)
            self.fates[f"answers: {reason or 'spoilt passage'}"] += 1
            if text is not None:
                row = {"task": "quality", "prefix": sample.prefix}
                more = {"damage": damage, **self.provenance(sample, "spoil", asked)}
                return "pair", [
                    {**row, "a": sample.suffix, "b": text, "label": "A", **more},
                    {**row, "a": text, "b": sample.suffix, "label": "B", **more},
                ]
        return None, reason

    async def unanimous(self, sample: Sample, wanted: set) -> tuple:
        """A suffix that all seeded judgments call safe, or all unsafe. The first of them tells
        whether the others are worth asking for."""
        labels = await self.votes(sample, range(1))
        if labels[0] and labels[0] not in wanted:
            return None, f"enough that are {labels[0]}"
        labels += await self.votes(sample, range(1, self.options.votes))
        if None in labels or len(set(labels)) > 1:
            return None, "a judgment without a verdict" if None in labels else "not unanimous"
        row = {"task": "safety", "text": sample.suffix, "label": labels[0]}
        if self.options.made == "rewriter":
            row = {"task": "rewrite", "prefix": sample.prefix, "original": sample.suffix}
            row["safe"] = labels[0] == "SAFE"
        more = self.provenance(sample, "safety", self.options.seed)
        return labels[0], [{**row, "votes": self.options.votes, **more}]

    async def votes(self, sample: Sample, numbers) -> list:
        asked = [self.judge.verdict("safety", vote, text=sample.suffix) for vote in numbers]
        return [label for label, _ in await together(asked)]

    def provenance(self, sample: Sample, prompt: str, seed: int) -> dict:
        code = hashlib.sha256(self.judge.prompts[prompt].encode()).hexdigest()[:16]
        more = {"model": self.options.model, "prompt_hash": code, "seed": seed}
        return {"document": sample.document, **sample.source, **more}


def read_spoilt(answer, sample: Sample, tokenizer) -> tuple[str | None, str]:
    """(spoilt passage, "") or (None, why the answer is none). It is cut to the tokens of the
    original, so that neither its length nor a finished last sentence gives it away."""
    if answer.text is None:
        return None, f"no answer ({answer.finish})"
    if (text := clean(answer.text, sample.prefix, sample.suffix)) is None:
        return None, "no passage"
    before, words = plain_words(sample.suffix), plain_words(text)
    if not LENGTH[0] <= len(words) / max(1, len(before)) <= LENGTH[1]:
        return None, "another length"
    text = tokenizer.decode(tokenizer.encode(text)[: len(tokenizer.encode(sample.suffix))])
    text = without_end(text)
    cut = plain_words(text)
    if before in (words[: len(before)], cut) or cut == before[: len(cut)]:
        return None, "unchanged"
    same = difflib.SequenceMatcher(None, before, cut, autojunk=False).get_matching_blocks()
    if sum(block.size for block in same) < KEPT * len(before):
        return None, "another text"
    return text, ""


def plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# ------------------------------------------------------------------------------------------------
# Sets


def half_of(document: str) -> str:
    """train or validation, by the document alone."""
    return HALVES[digest(f"held out {document}") / 2**64 < HELD_OUT]


def collect(options, maker: Maker, stream, fates: Counter) -> dict[str, list]:
    """Rows of each half, as many of one class as of the other. Samples are asked about in waves
    whose sizes depend on the rows so far, so an interrupted run walks the same way again."""
    sizes = dict(zip(HALVES, (options.count // 2, options.validation // 2), strict=True))
    found: dict = {half: {kind: [] for kind in maker.classes} for half in HALVES}
    total = len(maker.classes) * sum(sizes.values())
    bar = tqdm(total=total, desc=options.made, disable=None)
    rest, number, idle = total, 0, 0  # rows to find; samples so far, the latest without a row

    def wanted(half):
        return {kind for kind, rows in found[half].items() if len(rows) < sizes[half]}

    async def ask(wave):
        wants = {half: wanted(half) for half in HALVES}
        halves = [(half_of(sample.document), sample) for sample in wave]
        asked = [(half, sample) for half, sample in halves if wants[half]]
        fates["set already full"] += len(wave) - len(asked)
        made = await together(maker.make(sample, wants[half]) for half, sample in asked)
        return [(half, *row) for (half, _), row in zip(asked, made, strict=True)]

    while rest and (wave := list(islice(stream, min(max(rest, AT_ONCE[0]), AT_ONCE[1])))):
        maker.sample(wave)
        for half, kind, result in command.wait(maker.judge.chat.run(ask(wave))):
            number, idle = number + 1, idle + 1
            if kind is None:
                fates[f"dropped: {result}"] += 1
            elif kind not in wanted(half):
                fates["dropped: more than asked for"] += 1
            else:
                found[half][kind].append((number, result))
                rest, idle = rest - 1, 0
                bar.update(1)
        if idle > PATIENCE:
            raise UserError(f"{idle} samples in a row gave no row ({told(fates)})")
    bar.close()
    return {half: balanced(list(found[half].values()), fates) for half in HALVES}


def balanced(classes: list[list], fates: Counter) -> list[dict]:
    """As many of each class [(number of the sample, its rows)], in the order of the documents."""
    least = min(map(len, classes))
    kept = sorted(pair for found in classes for pair in found[:least])
    fates["dropped: without a counterpart of the other label"] += sum(map(len, classes)) - len(kept)
    if not kept:
        raise UserError(f"no row for one of the sets ({told(fates)})")
    return [row for _, rows in kept for row in rows]


def told(fates: Counter) -> str:
    return ", ".join(f"{what}: {count:,}" for what, count in fates.items() if count)


def write(options, out: Path, halves: dict[str, list], fates: Counter) -> None:
    """The files; counts.json last."""
    for half, rows in halves.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        packed = zstandard.ZstdCompressor().compress(lines.encode("utf-8", "replace"))
        write_bytes(out / f"{options.made}.{half}.jsonl.zst", packed)
    documents = {half: len({row["document"] for row in rows}) for half, rows in halves.items()}
    counts = {"task": options.made, "model": options.model, "seed": options.seed}
    counts |= {"rows": {half: len(rows) for half, rows in halves.items()}, "documents": documents}
    counts["counts"] = {what: count for what, count in sorted(fates.items()) if count}
    text = json.dumps(counts, indent=2)
    write_text(out / f"{options.made}.counts.json", text + "\n")
    print(text)


# ------------------------------------------------------------------------------------------------
# Command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    makers = parser.add_subparsers(dest="made", required=True)
    for made in ("quality", "safety", "rewriter"):
        add = makers.add_parser(made).add_argument
        add("--data", default="world", help="documents as for train.py; parts take turns")
        add("--text_field", help="JSON field of a document's text")
        add("--split", default="teacher", choices=("teacher", "all"), help="of the documents")
        add("--tokenizer", default="world", help="of the policy")
        add("--chunk", type=int, default=32, help="tokens of a suffix")
        add("--max_seq", type=int, default=96, help="tokens of prefix and suffix")
        role = "--judge_url"
        if made == "quality":
            role = "--rewrite_url"
            add("--policy", help="checkpoint whose rollouts are shown, too, tokenizer as above")
        add(role, dest="url", default="world", help="teacher's base URL(s) up to /v1")
        add("--model", default="teacher", help="its name there")
        add("--extra", default="", help="fields of each request, as train.py's judge_extra")
        add("--out", required=True, help="folder for the files")
        add("--count", type=int, default=2048, help="rows of the training set")
        add("--validation", type=int, default=256, help="rows of the validation set")
        add("--votes", type=int, default=8, help="judgments that have to agree")
        add("--prompts", default="prompts", help="folder of prompt files")
        add("--concurrency", type=int, default=256, help="questions in flight")
        add("--seed", type=int, default=0)
        add("--dials", default="", help="pocket world: of its corpus and its teacher")
    return parser.parse_args(arguments, argparse.Namespace(policy=None))


def main(arguments: list[str]) -> None:
    options, fates = parse(arguments), Counter()
    if min(options.count, options.validation) < 2 or not 0 < 2 * options.chunk <= options.max_seq:
        raise UserError("--count and --validation need 2 or more, --max_seq twice --chunk")
    tokenizer, out = load_tokenizer(options.tokenizer), Path(options.out).expanduser()
    how: dict = dict(concurrency=options.concurrency, extra=nested(options.extra))
    how["cache"] = out / "answers.sqlite"
    out.mkdir(parents=True, exist_ok=True)
    teacher = teacher_at(options.url, parse_dials(options.dials))
    with Chat(teacher, options.model, **how) as chat:
        maker = Maker(chat, options, tokenizer, fates)
        halves = collect(options, maker, samples(options, tokenizer, fates), fates)
        stats = chat.stats()
    write(options, out, halves, fates)
    print(f"{stats['calls']:,} requests, {stats['cached']:,} answers known from before")


if __name__ == "__main__":
    command.run(main)
