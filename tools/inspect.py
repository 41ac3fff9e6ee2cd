"""What is in a corpus; `python data.py inspect` runs this.

    python data.py inspect 'SlimPajama/train/chunk1/*.zst' --tokenizer path/to/policy

Prints format, fields, documents, tokens a document, what the unsafe filter would keep, and five
documents cut into prefix and suffix; draws the lengths as a histogram (PNG).
"""

import argparse
import os
from collections import Counter
from itertools import islice
from urllib.parse import urlsplit

import numpy as np
from matplotlib.figure import Figure

from data import digest, document_tokens, in_split, sample_of
from support import command
from support.command import UserError
from support.sources import Skips, ending, is_url, list_files, text_of
from support.tokenizer import load_tokenizer
from tools.filter import RULES, UNSAFE, documents, first_failure, records_with_signals

SHOWN = 300  # characters of a sample's prefix and suffix


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="shards: path, glob, folder, URL, .txt list")
    parser.add_argument("--tokenizer", default="world")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--max_seq", type=int, default=2048)
    parser.add_argument("--text_field")
    parser.add_argument("--limit", type=int, default=10_000, help="documents to look at")
    parser.add_argument("--png", default="lengths.png", help="where the histogram goes")
    parser.add_argument("--bad_words", help="word list, for a corpus without quality signals")
    parser.add_argument("--blocklist", help="file of domains, or UT1's folder")
    options = parser.parse_args(arguments)
    skips, texts = show_files_and_fields(options)
    if texts:
        show_lengths(options, texts)
        show_samples(options, texts)
        show_filter(options)
    for reason, count in skips.items():
        print(f"skipped, {reason}: {count:,}")


def show_files_and_fields(options) -> tuple[Skips, list[str]]:
    names, skips = list_files(options.source), Skips()
    kinds = Counter(kind_of(name) for name in names)
    size = sum(os.path.getsize(name) for name in names if not is_url(name))
    print(f"files      {len(names):,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})")
    print(f"size       {size / 1e6:,.1f} MB on disk")
    fields, texts, seen = Counter(), [], 0
    rows = ((name, *row) for name in names for row in records_with_signals(name, skips))
    for name, number, record in islice(rows, options.limit):
        seen += 1
        fields.update(f"{key}: {type(value).__name__}" for key, value in record.items())
        text, reason = text_of(record, options.text_field)
        if text is None:
            skips.note(reason, f"{name}:{number}")
        else:
            texts.append(text)
    more = "at least " if seen == options.limit else ""
    print(f"documents  {more}{seen:,}, {sum(map(len, texts)):,} characters of text")
    for field, count in fields.most_common():
        print(f"  {repr(field)[1:-1]:40} in {count / max(1, seen):6.1%} of them")
    return skips, texts


def kind_of(name: str) -> str:
    """.jsonl.zst"""
    path = urlsplit(name).path if is_url(name) else name
    return path[path.rindex(ending(name)) :] if ending(name) else "without an ending"


def show_lengths(options, texts: list[str]) -> None:
    """Tokens of each document, in numbers and as a histogram."""
    tokenizer = load_tokenizer(options.tokenizer)
    lengths = np.array([len(document_tokens(text, tokenizer)) for text in texts])
    marks = np.percentile(lengths, [0, 10, 50, 90, 100])
    short = int((lengths < 2 * options.chunk).sum())
    duplicates = len(texts) - len(set(map(digest, texts)))
    print(f"tokens     {lengths.sum():,} with tokenizer {options.tokenizer}; a document has")
    print("           {:,.0f} (least), {:,.0f} (10 %), {:,.0f} (median), ".format(*marks), end="")
    print("{:,.0f} (90 %), {:,.0f} (most)".format(*marks[3:]))
    print(
        f"too short  {short:,} for two chunks of {options.chunk} tokens; {duplicates:,} duplicates"
    )
    for split in ("train", "teacher", "validation", "test"):
        print(f"  {split:10} {sum(in_split(digest(text), split) for text in texts):,}")
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=np.geomspace(max(1, marks[0]), marks[4] + 1, 60))
    axes.axvline(2 * options.chunk, color="black", linestyle=":", label="two chunks")
    axes.axvline(options.max_seq, color="black", linestyle="--", label="max_seq")
    axes.set(xscale="log", xlabel="tokens", ylabel="documents", title=options.source[-60:])
    axes.legend()
    figure.savefig(options.png, dpi=120)
    print(f"histogram  {options.png}")


def show_samples(options, texts: list[str]) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    cuts = (sample_of(text, tokenizer, options.chunk, options.max_seq) for text in texts)
    samples = islice((sample for sample in cuts if sample), 5)
    for i, (prefix, suffix) in enumerate(samples, 1):
        before, after = tokenizer.decode(prefix), tokenizer.decode(suffix)
        print(f"\nsample {i}: prefix of {len(prefix):,} tokens, suffix of {len(suffix):,}")
        print(f"  prefix ...{before[-SHOWN:]!r}\n  suffix {after[:SHOWN]!r}")
    print()


def show_filter(options) -> None:
    """What the two readings of the unsafe filter would keep."""
    kept, seen = Counter(), 0
    try:
        for _, signals, _ in islice(documents(options, Skips(), "either"), options.limit):
            seen += 1
            for reading in UNSAFE:
                kept[first_failure(signals, reading) or f"kept, {reading}"] += 1
    except UserError:
        print("filter     no quality signals: --unsafe both needs --bad_words and --blocklist,")
        print("           --unsafe either one of them")
        return
    print(
        f"filter     of {seen:,} documents, curse words and blocklist: {kept['kept, both']:,} kept"
    )
    print(f"           curse words or blocklist: {kept['kept, either']:,} kept")
    for name in RULES:
        print(f"  - {name:38} {kept[name] // len(UNSAFE):,}")


if __name__ == "__main__":
    command.run(main)
