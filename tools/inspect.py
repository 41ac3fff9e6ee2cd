"""What is in a corpus.

    python -m tools.inspect 'SlimPajama/train/chunk1/*.zst' --tokenizer path/to/policy

In:  shards as for training, the first --limit documents of them
Out: format, fields, documents, tokens a document, what the unsafe filter would keep, five documents
     cut into prefix and suffix; and the lengths as a histogram (PNG)
"""

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
from tools import filter as unsafe

SHOWN = 300  # characters of a sample's prefix and suffix


def main(arguments: list[str]) -> None:
    parser = unsafe.corpus_flags(__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=10_000, help="documents to look at")
    parser.add_argument("--png", default="lengths.png", help="where the histogram goes")
    options = unsafe.parse(parser, arguments)
    if options.limit < 1 or not options.png.endswith(".png"):
        raise UserError("--limit must be above 0, and the name of --png end in .png")
    tokenizer, skips, kept = load_tokenizer(options.tokenizer), Skips(), Counter()
    texts = show_files_and_fields(options, skips, kept)
    if texts:
        show_lengths(options, texts, tokenizer)
        show_samples(options, texts, tokenizer)
        show_filter(kept)
    for reason, count in skips.items():
        print(f"skipped, {reason}: {count:,}")


def show_files_and_fields(options, skips: Skips, kept: Counter) -> list[str]:
    """The texts; `kept` counts the documents that have signals, and what the filter would do."""
    names = list_files(options.source)
    kinds = Counter(kind_of(name) for name in names)
    size = sum(os.path.getsize(name) for name in names if not is_url(name))
    print(f"files      {len(names):,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})")
    print(f"size       {size / 1e6:,.1f} MB on disk")
    fields, texts, seen = Counter(), [], 0
    rows = ((name, *row) for name in names for row in unsafe.records_with_signals(name, skips))
    for name, number, record in islice(rows, options.limit):
        seen += 1
        fields.update(f"{key}: {type(value).__name__}" for key, value in record.items())
        text, reason = text_of(record, options.text_field)
        if text is None:
            skips.note(reason, f"{name}:{number}")
            continue
        texts.append(text)
        signals, _ = unsafe.signals_of(record)
        for reading in unsafe.UNSAFE if signals else ():
            kept[f"documents, {reading}"] += 1
            kept[unsafe.first_failure(signals, reading) or f"kept, {reading}"] += 1
    more = "at least " if seen == options.limit else ""
    print(f"documents  {more}{seen:,}, {sum(map(len, texts)):,} characters of text")
    for field, count in fields.most_common():
        print(f"  {repr(field)[1:-1]:40} in {count / max(1, seen):6.1%} of them")
    return texts


def kind_of(name: str) -> str:
    """.jsonl.zst"""
    path = (urlsplit(name).path if is_url(name) else name).lower()
    return path[path.rindex(ending(name)) :] if ending(name) else "without an ending"


def show_lengths(options, texts: list[str], tokenizer) -> None:
    """Tokens of each document, in numbers and as a histogram."""
    lengths = np.array([len(document_tokens(text, tokenizer)) for text in texts])
    marks = np.percentile(lengths, [0, 10, 50, 90, 100])
    short = int((lengths < 2 * options.chunk).sum())
    duplicates = len(texts) - len(set(map(digest, texts)))
    print(f"tokens     {lengths.sum():,} with tokenizer {options.tokenizer}; a document has")
    print("           {:,.0f} (least), {:,.0f} (10 %), {:,.0f} (median), ".format(*marks), end="")
    print("{:,.0f} (90 %), {:,.0f} (most)".format(*marks[3:]))
    print(f"too short  {short:,} for two chunks of {options.chunk}; {duplicates:,} duplicates")
    for split in unsafe.OUTPUTS:
        print(f"  {split:10} {sum(in_split(digest(text), split) for text in texts):,}")
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=np.geomspace(max(1, marks[0]), marks[4] + 1, 60))
    axes.axvline(2 * options.chunk, color="black", linestyle=":", label="two chunks")
    axes.axvline(options.max_seq, color="black", linestyle="--", label="max_seq")
    axes.set(xscale="log", xlabel="tokens", ylabel="documents")
    axes.set_title(options.source[-60:], parse_math=False)
    axes.legend()
    figure.savefig(options.png, dpi=120)
    print(f"histogram  {options.png}")


def show_samples(options, texts: list[str], tokenizer) -> None:
    cuts = (sample_of(text, tokenizer, options.chunk, options.max_seq) for text in texts)
    samples = islice((sample for sample in cuts if sample), 5)
    for i, (prefix, suffix) in enumerate(samples, 1):
        before, after = tokenizer.decode(prefix), tokenizer.decode(suffix)
        print(f"\nsample {i}: prefix of {len(prefix):,} tokens, suffix of {len(suffix):,}")
        print(f"  prefix ...{before[-SHOWN:]!r}\n  suffix {after[:SHOWN]!r}")
    print()


def show_filter(kept: Counter) -> None:
    """What the two readings of the unsafe filter would keep."""
    if not kept:
        print("filter     no document has quality signals")
        return
    print(f"filter     of {kept['documents, both']:,} documents,")
    print(f"           curse words and blocklist: {kept['kept, both']:,} kept")
    print(f"           curse words or blocklist: {kept['kept, either']:,} kept")
    for name in unsafe.RULES:
        print(f"  - {name:38} {kept[name] // len(unsafe.UNSAFE):,}")


if __name__ == "__main__":
    command.run(main)
