"""What is in a corpus.

    python -m tools.inspect 'SlimPajama/train/chunk1/*.zst' --tokenizer path/to/policy

In:  shards as for training, the first --limit documents of them
Out: format, fields, documents, tokens a document, the splits, five documents cut into prefix and
     suffix
"""

import os
from collections import Counter
from itertools import islice

import numpy as np

from data import SPLITS, digest, document_tokens, in_split, sample_of
from support import command
from support.sources import Skips, ending, is_url, list_files, records, text_of
from support.tokenizer import load_tokenizer
from tools.filter import corpus_flags, parse

SHOWN = 300  # characters of a sample's prefix and suffix


def main(arguments: list[str]) -> None:
    parser = corpus_flags(__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=10_000, help="documents to look at")
    options, skips = parse(parser, arguments, "limit"), Skips()
    tokenizer = load_tokenizer(options.tokenizer)
    if texts := show_files_and_fields(options, skips):
        show_lengths(options, texts, tokenizer)
        show_samples(options, texts, tokenizer)
    for reason, count in skips.items():
        print(f"skipped, {reason}: {count:,}")


def show_files_and_fields(options, skips: Skips) -> list[str]:
    """-> the texts"""
    names, fields, texts = list_files(options.source), Counter(), []
    skips.shards = len(names)
    kinds = Counter(ending(name) or "without an ending" for name in names)
    size = sum(os.path.getsize(name) for name in names if not is_url(name))
    print(f"files      {len(names):,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})")
    print(f"size       {size / 1e6:,.1f} MB on disk")
    rows = ((name, *row) for name in names for row in records(name, skips))
    seen = 0
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
        print(f"  {repr(field)[1:-1]:40} in {count / seen:6.1%} of them")
    return texts


def show_lengths(options, texts: list[str], tokenizer) -> None:
    lengths = np.array([len(document_tokens(text, tokenizer)) for text in texts])
    marks = [f"{mark:,.0f}" for mark in np.percentile(lengths, [0, 10, 50, 90, 100])]
    keys = [digest(text) for text in texts]
    short = int((lengths < 2 * options.chunk).sum())
    print(f"tokens     {lengths.sum():,} with tokenizer {options.tokenizer}; a document has")
    print("           {} (least), {} (10 %), {} (median), {} (90 %), {} (most)".format(*marks))
    print(f"too short  {short:,} for two chunks of {options.chunk} tokens")
    print(f"duplicates {len(keys) - len(set(keys)):,}")
    for split in SPLITS:
        print(f"  {split:10} {sum(in_split(key, split) for key in keys):,}")


def show_samples(options, texts: list[str], tokenizer) -> None:
    cuts = (sample_of(text, tokenizer, options.chunk, options.max_seq) for text in texts)
    for number, (prefix, suffix) in enumerate(islice(filter(None, cuts), 5), 1):
        before, after = tokenizer.decode(prefix), tokenizer.decode(suffix)
        print(f"\nsample {number}: prefix of {len(prefix):,} tokens, suffix of {len(suffix):,}")
        print(f"  prefix ...{before[-SHOWN:]!r}\n  suffix {after[:SHOWN]!r}")
    print()


if __name__ == "__main__":
    command.run(main)
