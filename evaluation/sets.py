"""Held-out prefixes to continue: from documents, the pocket world, or published evaluation sets.

In: a path, glob or URL of each set, in the format in which its authors publish it (`LOADERS`).
Out: `HeldOut`: token batches, the texts they stand for, reference texts, and what is asked of a
continuation. A file of another format is a UserError that names the file, the line and the field.
"""

from support.command import UserError
import csv
import io
import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import Batch, Stream
from support.sources import Bomb, Skips, decompressed, ending, list_files, open_raw, records
from world.corpus import Dials, WorldSource

BATCH = 64  # prefixes continued at once
ARTICLE = 8000  # characters of an article that serve as the reference

# What a suite asks of the continuations of a set: the judge's kind of question (judge.VERDICTS).
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


def held_out(source, tokenizer, *, chunk, max_seq, count, split="validation", text_field=None):
    """The first `count` samples of a split that no training run reads."""
    stream = Stream(
        source,
        tokenizer,
        chunk=chunk,
        max_seq=max_seq,
        batch_size=BATCH,
        seed=0,
        text_field=text_field,
        split=split,
        window=count,
        epochs=1,
    )
    samples = itertools.islice(stream.samples(), count)
    rows = [(number, *sample) for number, sample, _ in samples]
    batches = [stream.collate(rows[i : i + BATCH], {}) for i in range(0, len(rows), BATCH)]
    prefixes = [text for batch in batches for text in batch.prefix_text]
    references = [text for batch in batches for text in batch.suffix_text]
    return HeldOut(batches, prefixes, references, DOCUMENTS)


def held_out_sets(data, tokenizer, dials: dict | None = None, **how) -> dict[str, HeldOut]:
    """Clean and unsafe prefixes of the pocket world, or a split of a corpus (the validation one,
    unless `how` names another), which is also what the set is called."""
    if data != "world":
        return {how.get("split", "validation"): held_out(data, tokenizer, **how)}
    how.pop("text_field", None), how.pop("split", None)
    return {
        kind: held_out(
            WorldSource(0, Dials(**{**(dials or {}), **share}), "validation"), tokenizer, **how
        )
        for kind, share in {
            "clean": dict(share_unsafe=0.0),
            "unsafe": dict(share_unsafe=1.0),
        }.items()
    }


# ------------------------------------------------------------------------------------------------
# Published sets: each loader yields (prefix, reference) pairs


def rows(source: str) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", record) of .jsonl, .json (an object a line), .parquet, .csv and .txt files;
    a line of a .txt file is a record {"line": text}."""
    for name in list_files(source):
        if ending(name) in (".csv", ".txt"):
            text = io.StringIO(content(name), newline="")
            if ending(name) == ".csv":
                table = csv.DictReader(text)
                try:
                    yield from ((f"{name}:{table.line_num}", record) for record in table)
                except csv.Error as error:
                    raise UserError(f"{name}:{table.line_num}: {error}") from None
            else:
                lines = enumerate(text.read().splitlines(), 1)
                yield from ((f"{name}:{i}", {"line": line}) for i, line in lines if line.strip())
            continue
        skips = Skips()
        skips.shown = 0
        for line, record in records(name, skips):
            yield f"{name}:{line}", record
        if skips:
            raise UserError(f"{name} is not a complete file of this set ({', '.join(skips)})")


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


def real_toxicity_prompts(source):
    """prompts.jsonl: {"prompt": {"text", "toxicity", ...}, "continuation": {...}, ...}"""
    for where, record in rows(source):
        prompt = record.get("prompt")
        yield text_in(where, prompt if isinstance(prompt, dict) else record, "text"), ""


def toxigen(source):
    """toxigen.csv or .parquet ("prompt"), the annotated set ("text"), or prompts/*.txt, a prompt a
    line. A prompt's line breaks are written as backslash and n."""
    for where, record in rows(source):
        yield text_in(where, record, "prompt", "text", "line").replace("\\n", "\n"), ""


def xstest(source, unsafe: bool):
    """xstest_v2_prompts.csv: id, type, prompt, and label in some versions. Unsafe prompts are of a
    type "contrast_...". Half of the set: the unsafe prompts or the others."""
    for where, record in rows(source):
        kind = text_in(where, record, "type")
        label = record.get("label") or ("unsafe" if kind.startswith("contrast_") else "safe")
        if (label == "unsafe") == unsafe:
            yield text_in(where, record, "prompt"), ""


def factscore(source, knowledge: str | None = None):
    """prompt_entities.txt (a name a line) or data/*/*.jsonl ("topic"). The reference is the
    entity's article in `knowledge`, or else the facts that human annotators found supported."""
    articles, topics = Articles(knowledge) if knowledge else None, {}
    for where, record in rows(source):
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
        topics.setdefault(topic, articles[topic] if articles else facts)
    if not any(topics.values()):
        raise UserError(
            f"{source}: no reference text for any entity; name FActScore's Wikipedia as "
            "--knowledge FILE.db (or .jsonl), or a file of data/labeled"
        )
    for topic, reference in topics.items():
        if reference:
            yield f"Question: Tell me a bio of {topic}.\nAnswer:", reference


class Articles:
    """FActScore's knowledge source: an SQLite file documents(title, text), or .jsonl of the same.
    articles[title] is the beginning of the article, "" if there is none."""

    def __init__(self, source: str):
        self.texts, self.source, self.db = {}, source, None
        if source.endswith(".db"):
            if not Path(source).is_file():
                raise UserError(f"no such file: {source}")
            self.db = sqlite3.connect(f"file:{source}?mode=ro", uri=True)
            return
        for where, record in rows(source):
            text = record.get("text")
            record["text"] = " ".join(text) if isinstance(text, list) else text
            self.texts[text_in(where, record, "title")] = text_in(where, record, "text")

    def __getitem__(self, title: str) -> str:
        text = self.texts.get(title, "")
        if self.db:
            query = "SELECT text FROM documents WHERE title = ?"
            try:
                text = (self.db.execute(query, (title,)).fetchone() or [""])[0]
            except sqlite3.Error as error:
                raise UserError(
                    f"{self.source}: {error}; it needs documents(title, text)"
                ) from None
        for mark, plain in (("####SPECIAL####SEPARATOR####", "\n"), ("<s>", ""), ("</s>", "")):
            text = text.replace(mark, plain)
        return text[:ARTICLE]


def halueval_qa(source):
    """qa_data.json: a line {"knowledge", "question", "right_answer", "hallucinated_answer"}"""
    for where, record in rows(source):
        known = text_in(where, record, "knowledge")
        right = text_in(where, record, "right_answer")
        question = text_in(where, record, "question")
        yield f"Question: {question}\nAnswer:", f"{known}\nAnswer: {right}"


def halueval_dialogue(source):
    """dialogue_data.json: {"knowledge", "dialogue_history", "right_response", ...}"""
    for where, record in rows(source):
        known = text_in(where, record, "knowledge")
        right = text_in(where, record, "right_response")
        history = text_in(where, record, "dialogue_history").strip()
        yield f"{history} [Assistant]:", f"{known}\nAnswer: {right}"


def halueval_summarization(source):
    """summarization_data.json: {"document", "right_summary", "hallucinated_summary"}"""
    for where, record in rows(source):
        document = text_in(where, record, "document")
        yield f"{document}\n\nSummary:", text_in(where, record, "right_summary")


LOADERS = {  # name of the set -> (loader, its options, what is asked)
    "realtoxicityprompts": (real_toxicity_prompts, {}, SAFETY),
    "toxigen": (toxigen, {}, SAFETY),
    "xstest_safe": (xstest, {"unsafe": False}, SAFETY),
    "xstest_unsafe": (xstest, {"unsafe": True}, SAFETY),
    "factscore": (factscore, {}, PAIR),
    "halueval_qa": (halueval_qa, {}, PAIR),
    "halueval_dialogue": (halueval_dialogue, {}, PAIR),
    "halueval_summarization": (halueval_summarization, {}, PAIR),
}


def published(name, source, tokenizer, *, chunk, max_seq, count, knowledge=None) -> HeldOut:
    """`count` prompts of a published set, drawn without regard to its order, always the same."""
    load, options, asks = LOADERS[name]
    if name == "factscore":
        options = {"knowledge": knowledge}
    pairs = list(load(source, **options))
    if not pairs:
        raise UserError(f"{source} holds no prompt of {name}")
    chosen = np.sort(np.random.default_rng(0).permutation(len(pairs))[:count])
    prefixes, references = zip(*(pairs[i] for i in chosen), strict=True)
    return from_texts(prefixes, references, asks, tokenizer, max_seq - chunk)


def from_texts(prefixes, references, asks, tokenizer, most: int) -> HeldOut:
    """Prefixes of at most `most` tokens, cut at the left, with no suffix."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [(start + tokenizer.encode(prefix))[-most:] for prefix in prefixes]
    texts = [
        text if len(row) < most else tokenizer.decode(row)
        for text, row in zip(prefixes, ids, strict=True)
    ]
    batches = []
    for first in range(0, len(ids), BATCH):
        some = ids[first : first + BATCH]
        length = max(map(len, some))
        padding = [length - len(row) for row in some]
        batches.append(
            Batch(
                prefix=torch.tensor(
                    [[tokenizer.eos] * n + row for n, row in zip(padding, some, strict=True)]
                ),
                pad=torch.tensor(padding, dtype=torch.int32),
                suffix=torch.empty(len(some), 0, dtype=torch.int64),
                index=torch.arange(first, first + len(some)),
                prefix_text=texts[first : first + BATCH],
                suffix_text=[],
                state={},
            )
        )
    return HeldOut(batches, texts, list(references), asks)
