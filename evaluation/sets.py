"""Held-out prefixes to continue: from documents, the pocket world, or published evaluation sets.

In: a path, glob or URL of each set, in the format in which its authors publish it (`FORMS`).
Out: `HeldOut`: token batches, the texts they stand for, reference texts, and what is asked of a
continuation. A file of another format is a UserError that names the file, the line and the field.
"""

import contextlib
import csv
import io
import itertools
import logging
import re
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from zstandard import ZstdError

from data import Batch, Stream, left_pad
from support.command import UserError
from support.sources import Skips, decompressed, ending, list_files, open_raw, records
from world.corpus import Dials, WorldSource
from world.truth import FAULTY, words_of

BATCH = 64  # prefixes continued at once
ARTICLE = 8000  # characters of an article that serve as the reference

# What a suite asks of the continuations of a set: the judge's kind of question (VERDICTS).
DOCUMENTS = {kind: kind for kind in ("quality", "safety", "factuality", "coherence")}
SAFETY, PAIR = {"safety": "safety"}, {"factuality": "factuality_pair"}

# Published sets: (prefix, reference) in the fields of a line, and what is asked. {a|b}: whichever
# of the two a line has. A .txt file has a field "line".
KNOWN = "{knowledge}\nAnswer:"
FORMS = {
    "realtoxicityprompts": ("{text}", "", SAFETY),  # prompts.jsonl
    "toxigen": ("{prompt|text|line}", "", SAFETY),  # .csv, .parquet, annotated, prompts/*.txt
    "xstest_safe": ("{prompt}", "", SAFETY),  # xstest_v2_prompts.csv
    "xstest_unsafe": ("{prompt}", "", SAFETY),
    # prompt_entities.txt, data/*/*.jsonl
    "factscore": ("Question: Tell me a bio of {topic}.\nAnswer:", "{article}", PAIR),
    # qa_data.json, dialogue_data.json, summarization_data.json
    "halueval_qa": ("Question: {question}\nAnswer:", f"{KNOWN} {{right_answer}}", PAIR),
    "halueval_dialogue": ("{dialogue_history} [Assistant]:", f"{KNOWN} {{right_response}}", PAIR),
    "halueval_summarization": ("{document}\n\nSummary:", "{right_summary}", PAIR),
}


@dataclass
class HeldOut:
    """Prefixes of one kind, the same for every policy."""

    batches: list  # of data.Batch
    prefixes: list
    references: list  # the original suffixes, or what is known to be true; "" where there is none
    asks: dict  # suite -> the judge's kind of question
    masks: list  # of each batch: what of its suffixes [B, N] is of a kind whose NLL is told apart


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
    if len(prefixes) < count:
        logging.warning("%s of %s: %d of %d prefixes", split, source, len(prefixes), count)
    return HeldOut(batches, prefixes, references, DOCUMENTS, [{} for _ in batches])


def held_out_sets(data, tokenizer, dials: dict | None = None, **how) -> dict[str, HeldOut]:
    """Clean and unsafe prefixes of the pocket world, or of a corpus what is called as its split.

    `how`: chunk, max_seq, count; split, if not validation; of a corpus also text_field.
    """
    if data != "world":
        return {how.get("split", "validation"): held_out(data, tokenizer, **how)}
    sets, split = {}, how.get("split", "all").replace("all", "validation")
    how = {name: how[name] for name in ("chunk", "max_seq", "count")}
    for kind, share in (("clean", 0.0), ("unsafe", 1.0)):
        own = Dials(**{**(dials or {}), "share_unsafe": share})
        held = sets[kind] = held_out(WorldSource(0, own, split), tokenizer, **how)
        held.masks = [sound_and_faulty(batch) for batch in held.batches]
    return sets


def sound_and_faulty(batch: Batch) -> dict[str, torch.Tensor]:
    """Which tokens of the pocket world's suffixes stand in sound sentences and which in faulty
    ones: bool [B, N]. Fillers and unfinished sentences are neither. Nothing for a tokenizer of
    which a token is not a word."""
    verdicts = [
        words_of(*texts) for texts in zip(batch.prefix_text, batch.suffix_text, strict=True)
    ]
    N = batch.suffix.shape[1]
    if any(len(found) not in (N - 1, N) for found in verdicts):
        return {}
    rows = [(found + [""])[:N] for found in verdicts]  # behind the words, the end of text
    return {
        name: torch.tensor([[word in kinds for word in row] for row in rows])
        for name, kinds in (("sound", ("sound",)), ("faulty", FAULTY))
    }


# ------------------------------------------------------------------------------------------------
# Published sets


def rows(source: str) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", record) of .jsonl, .json (an object a line), .parquet and .csv files; of a .txt
    file {"line": text}."""
    for name in list_files(source):
        skips, line = Skips(), 0
        try:
            found = tables(name) if ending(name) in (".csv", ".txt") else records(name, skips)
            for line, record in found:
                yield f"{name}:{line}", record
        except (OSError, UnicodeError, csv.Error, zlib.error, ZstdError) as error:
            raise UserError(f"{name} can't be read after line {line}: {error!r}") from None
        if skips:
            raise UserError(f"{name} is not a complete file of this set ({', '.join(skips)})")


def tables(name: str) -> Iterator[tuple[int, dict]]:
    with open_raw(name) as raw:
        text = b"".join(decompressed(raw)).decode("utf-8-sig")
    if ending(name) == ".txt":
        lines = enumerate(text.splitlines(), 1)
        yield from ((number, {"line": line}) for number, line in lines if line.strip())
    else:
        table = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((table.line_num, record) for record in table)


def filled(form: str, where: str, record: dict) -> str:
    """A form with the texts of a record; of {a|b} the first that it has."""

    def text(match) -> str:
        names = match[1].split("|")
        found = next((record[n] for n in names if record.get(n) is not None), None)
        if not isinstance(found, str) or not found.strip():
            fields = ", ".join(map(str, record))
            raise UserError(f"{where} has no text under {' or '.join(names)}; its fields: {fields}")
        return found

    return re.sub(r"\{(.+?)\}", text, form)


def adapted(name: str, where: str, record: dict, knowledge: str | None) -> dict | None:
    """What is odd about the lines of a set, put right; None for one that is not asked about."""
    if name == "realtoxicityprompts" and isinstance(record.get("prompt"), dict):
        return record["prompt"]
    if name == "toxigen":  # line breaks are written as backslash and n
        return {key: v.replace("\\n", "\n") for key, v in record.items() if isinstance(v, str)}
    if name.startswith("xstest"):  # some versions have no label
        kind = "unsafe" if filled("{type}", where, record).startswith("contrast_") else "safe"
        return record if name.endswith(f"_{record.get('label') or kind}") else None
    if name == "halueval_dialogue":
        return record | {"dialogue_history": filled("{dialogue_history}", where, record).strip()}
    if name == "factscore":
        topic = filled("{topic|line}", where, record).strip()
        text = article(knowledge, topic)
        return {"topic": topic, "article": text} if text else None
    return record


def read_pairs(name: str, source: str, knowledge: str | None = None) -> list[tuple[str, str]]:
    """All (prefix, reference) of a published set, a key of FORMS."""
    if name == "factscore" and not knowledge:
        raise UserError("factscore: name FActScore's Wikipedia as --knowledge FILE.db")
    pairs = []
    for where, line in rows(source):
        if record := adapted(name, where, line, knowledge):
            prefix, reference = (filled(form, where, record) for form in FORMS[name][:2])
            pairs.append((prefix, reference))
    if not pairs:
        raise UserError(f"{source} holds no prompt of {name} that can be asked")
    return list(dict.fromkeys(pairs)) if name == "factscore" else pairs  # an entity once


def article(source: str, title: str) -> str:
    """The beginning of an article in FActScore's Wikipedia, an SQLite file documents(title, text),
    without its marks; "" if there is none."""
    query, path = "SELECT text FROM documents WHERE title = ?", Path(source).expanduser().absolute()
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            (text,) = database.execute(query, (title,)).fetchone() or ("",)
    except sqlite3.Error as error:
        raise UserError(f"{source}: {error}; it needs documents(title, text)") from None
    text = text.replace("####SPECIAL####SEPARATOR####", "\n")
    return re.sub("</?s>", "", text)[:ARTICLE]


def published(name, source, tokenizer, *, chunk, max_seq, count, knowledge=None) -> HeldOut:
    """`count` prompts of a published set, drawn without regard to its order, always the same."""
    pairs = read_pairs(name, source, knowledge)
    chosen = np.sort(np.random.default_rng(0).permutation(len(pairs))[:count])
    prefixes, references = zip(*(pairs[i] for i in chosen), strict=True)
    return from_texts(prefixes, references, FORMS[name][2], tokenizer, max_seq - chunk)


def from_texts(prefixes, references, asks, tokenizer, most: int) -> HeldOut:
    """Prefixes of at most `most` tokens, cut at the left, with no suffix."""
    ids = [[*tokenizer.start_ids, *tokenizer.encode(prefix)][-most:] for prefix in prefixes]
    whole = zip(prefixes, ids, strict=True)
    texts = [text if len(row) < most else tokenizer.decode(row) for text, row in whole]
    batches = []
    for first in range(0, len(ids), BATCH):
        prefix, pad = left_pad(ids[first : first + BATCH], tokenizer.eos)  # [B, P], [B]
        index = torch.arange(first, first + len(pad))
        suffix = torch.empty(len(pad), 0, dtype=torch.int64)
        batches.append(Batch(prefix, pad, suffix, index, texts[first : first + BATCH], [], {}))
    return HeldOut(batches, texts, list(references), asks, [{} for _ in batches])
