"""Held-out prefixes to continue: from documents, the pocket world, or published evaluation sets.

In: a path, glob or URL of each set, in the format in which its authors publish it (`READERS`).
Out: `HeldOut`: token batches, the texts they stand for, reference texts, and what is asked of a
continuation. A file of another format is a UserError that names the file, the line and the field.
"""

import csv
import io
import itertools
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import Batch, Stream, left_pad
from support.command import UserError
from support.sources import Bomb, Skips, decompressed, ending, list_files, open_raw, records
from world.corpus import Dials, WorldSource

BATCH = 64  # prefixes continued at once
ARTICLE = 8000  # characters of an article that serve as the reference

# What a suite asks of the continuations of a set: the judge's kind of question (VERDICTS).
DOCUMENTS = {kind: kind for kind in ("quality", "safety", "factuality", "coherence")}
SAFETY, PAIR = {"safety": "safety"}, {"factuality": "factuality_pair"}


@dataclass
class HeldOut:
    """Prefixes of one kind, the same for every policy."""

    batches: list  # of data.Batch
    prefixes: list
    references: list  # the original suffixes, or what is known to be true; "" where there is none
    asks: dict  # suite -> the judge's kind of question


# ------------------------------------------------------------------------------------------------
# Documents


def held_out(source, tokenizer, *, count, split="validation", **how) -> HeldOut:
    """The first `count` samples of a split that no training run reads; `how`: of data.Stream."""
    how |= dict(batch_size=BATCH, seed=0, split=split, window=count, epochs=1)
    stream = Stream(source, tokenizer, **how)
    samples = itertools.islice(stream.samples(), count)
    rows = [(number, *sample) for number, sample, _ in samples]
    batches = [stream.collate(rows[i : i + BATCH], {}) for i in range(0, len(rows), BATCH)]
    prefixes = [text for batch in batches for text in batch.prefix_text]
    references = [text for batch in batches for text in batch.suffix_text]
    return HeldOut(batches, prefixes, references, DOCUMENTS)


def held_out_sets(data, tokenizer, dials: dict | None = None, **how) -> dict[str, HeldOut]:
    """Clean and unsafe prefixes of the pocket world, or a split of a corpus (the validation one,
    unless `how` names another), which is also what the set is called.

    `how`: chunk, max_seq, count; of a corpus also text_field and split.
    """
    if data != "world":
        return {how.get("split", "validation"): held_out(data, tokenizer, **how)}
    how = {name: how[name] for name in ("chunk", "max_seq", "count")}
    sets = {}
    for kind, share in (("clean", 0.0), ("unsafe", 1.0)):
        own = Dials(**{**(dials or {}), "share_unsafe": share})
        sets[kind] = held_out(WorldSource(0, own, "validation"), tokenizer, **how)
    return sets


# ------------------------------------------------------------------------------------------------
# Files of published sets


def rows(source: str) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", record) of .jsonl, .json (an object a line), .parquet, .csv and .txt files;
    a line of a .txt file is a record {"line": text}."""
    for name in list_files(source):
        skips = Skips()
        skips.shown = 0
        if ending(name) == ".csv":
            found = csv_rows(name)
        elif ending(name) == ".txt":
            lines = enumerate(content(name).splitlines(), 1)
            found = ((number, {"line": line}) for number, line in lines if line.strip())
        else:
            found = records(name, skips)
        yield from ((f"{name}:{line}", record) for line, record in found)
        if skips:
            raise UserError(f"{name} is not a complete file of this set ({', '.join(skips)})")


def csv_rows(name: str) -> Iterator[tuple[int, dict]]:
    table = csv.DictReader(io.StringIO(content(name), newline=""))
    try:
        yield from ((table.line_num, record) for record in table)
    except csv.Error as error:
        raise UserError(f"{name}:{table.line_num}: {error}") from None


def content(name: str) -> str:
    try:
        with open_raw(name) as raw:
            return b"".join(decompressed(raw)).decode("utf-8-sig")
    except (OSError, ValueError, EOFError, Bomb) as error:
        raise UserError(f"{name} can't be read: {error!r}") from None


def text_in(where: str, record: dict, *names: str) -> str:
    """The first of these fields that the record has; it must be text."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None or not isinstance(record[name], str) or not record[name].strip():
        fields = ", ".join(map(str, record))
        raise UserError(f"{where} has no text under {' or '.join(names)}; its fields: {fields}")
    return record[name]


# ------------------------------------------------------------------------------------------------
# Published sets: (where, record) -> (prefix, reference), or None for a record of another set


def real_toxicity_prompt(where: str, record: dict):
    """prompts.jsonl: {"prompt": {"text", "toxicity", ...}, "continuation": {...}, ...}"""
    prompt = record.get("prompt")
    return text_in(where, prompt if isinstance(prompt, dict) else record, "text"), ""


def toxigen(where: str, record: dict):
    """toxigen.csv or .parquet ("prompt"), the annotated set ("text"), or prompts/*.txt, a prompt a
    line. A prompt's line breaks are written as backslash and n."""
    return text_in(where, record, "prompt", "text", "line").replace("\\n", "\n"), ""


def xstest(where: str, record: dict, half: str):
    """xstest_v2_prompts.csv: id, type, prompt, and label in some versions. Unsafe prompts are of a
    type "contrast_..."."""
    kind = text_in(where, record, "type")
    label = record.get("label") or ("unsafe" if kind.startswith("contrast_") else "safe")
    return (text_in(where, record, "prompt"), "") if label == half else None


HALUEVAL = {  # name of the set -> prefix and reference, of the fields of a line
    "halueval_qa": ("Question: {question}\nAnswer:", "{knowledge}\nAnswer: {right_answer}"),
    "halueval_dialogue": (
        "{dialogue_history} [Assistant]:",
        "{knowledge}\nAnswer: {right_response}",
    ),
    "halueval_summarization": ("{document}\n\nSummary:", "{right_summary}"),
}


def halueval(where: str, record: dict, prefix: str, reference: str):
    """qa_data.json, dialogue_data.json and summarization_data.json, an object a line."""
    names = re.findall(r"\{(\w+)\}", reference + prefix)
    texts = {name: text_in(where, record, name) for name in names}
    if "dialogue_history" in texts:
        texts["dialogue_history"] = texts["dialogue_history"].strip()
    return prefix.format(**texts), reference.format(**texts)


def factscore(where: str, record: dict, article: Callable[[str], str] | None = None):
    """prompt_entities.txt (a name a line) or data/*/*.jsonl ("topic"). The reference is the
    entity's article, or else the facts that human annotators found supported; "" without any."""
    topic = text_in(where, record, "topic", "line").strip()
    try:
        facts = " ".join(
            fact["text"]
            for sentence in record.get("annotations") or []
            for fact in sentence.get("human-atomic-facts") or []
            if fact.get("label") == "S"
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its annotations are not FActScore's: {error!r}") from None
    reference = article(topic) if article else facts
    return f"Question: Tell me a bio of {topic}.\nAnswer:", reference


def articles(source: str) -> Callable[[str], str]:
    """FActScore's knowledge source, an SQLite file documents(title, text), or .jsonl of the same:
    title -> the beginning of its article, "" if there is none."""
    if not source.endswith(".db"):
        texts = {}
        for where, record in rows(source):
            text = record.get("text")
            record["text"] = " ".join(text) if isinstance(text, list) else text
            texts[text_in(where, record, "title")] = text_in(where, record, "text")
        return lambda title: plain(texts.get(title, ""))
    if not (path := Path(source).expanduser().absolute()).is_file():
        raise UserError(f"no such file: {source}")
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)

    def look_up(title: str) -> str:
        query = "SELECT text FROM documents WHERE title = ?"
        try:
            return plain((database.execute(query, (title,)).fetchone() or [""])[0])
        except sqlite3.Error as error:
            raise UserError(f"{source}: {error}; it needs documents(title, text)") from None

    return look_up


def plain(text: str) -> str:
    """The beginning of an article of FActScore's Wikipedia, without its marks."""
    for mark, instead in (("####SPECIAL####SEPARATOR####", "\n"), ("<s>", ""), ("</s>", "")):
        text = text.replace(mark, instead)
    return text[:ARTICLE]


READERS: dict[str, Callable] = {
    "realtoxicityprompts": real_toxicity_prompt,
    "toxigen": toxigen,
    "xstest_safe": partial(xstest, half="safe"),
    "xstest_unsafe": partial(xstest, half="unsafe"),
    "factscore": factscore,
    **{name: partial(halueval, prefix=p, reference=r) for name, (p, r) in HALUEVAL.items()},
}


def read_pairs(name: str, source: str, knowledge: str | None = None) -> list[tuple[str, str]]:
    """All (prefix, reference) of a published set, a key of READERS."""
    read = READERS[name]
    if name == "factscore" and knowledge:
        read = partial(read, article=articles(knowledge))
    pairs = [pair for where, record in rows(source) if (pair := read(where, record))]
    if name == "factscore":
        known: dict[str, str] = {}
        for prefix, reference in pairs:
            known.setdefault(prefix, reference)  # an entity may stand there several times
        pairs = [pair for pair in known.items() if pair[1]]
        if not pairs:
            raise UserError(
                f"{source}: no reference text for any entity; name FActScore's Wikipedia as "
                "--knowledge FILE.db (or .jsonl), or a file of data/labeled"
            )
    if not pairs:
        raise UserError(f"{source} holds no prompt of {name}")
    return pairs


def published(name, source, tokenizer, *, chunk, max_seq, count, knowledge=None) -> HeldOut:
    """`count` prompts of a published set, drawn without regard to its order, always the same."""
    pairs = read_pairs(name, source, knowledge)
    chosen = np.sort(np.random.default_rng(0).permutation(len(pairs))[:count])
    prefixes, references = zip(*(pairs[i] for i in chosen), strict=True)
    asks = PAIR if name in ("factscore", *HALUEVAL) else SAFETY
    return from_texts(prefixes, references, asks, tokenizer, max_seq - chunk)


def from_texts(prefixes, references, asks, tokenizer, most: int) -> HeldOut:
    """Prefixes of at most `most` tokens, cut at the left, with no suffix."""
    ids = [[*tokenizer.start_ids, *tokenizer.encode(prefix)][-most:] for prefix in prefixes]
    texts = [
        text if len(row) < most else tokenizer.decode(row)
        for text, row in zip(prefixes, ids, strict=True)
    ]
    batches = []
    for first in range(0, len(ids), BATCH):
        prefix, pad = left_pad(ids[first : first + BATCH], tokenizer.eos)  # [B, P], [B]
        B = len(pad)
        batches.append(
            Batch(
                prefix=prefix,
                pad=pad,
                suffix=torch.empty(B, 0, dtype=torch.int64),
                index=torch.arange(first, first + B),
                prefix_text=texts[first : first + BATCH],
                suffix_text=[],
                state={},
            )
        )
    return HeldOut(batches, texts, list(references), asks)
