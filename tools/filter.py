"""RedPajama's unsafe documents, chosen in two stages.

    python -m tools.filter 'documents/2023-14/*/en_*.json.gz' --out data/redpajama_unsafe
    python -m tools.filter ... --judge_url http://localhost:8000/v1 --judge_model gpt-oss-120b \\
        --tokenizer path/to/policy

In:  shards of RedPajama-V2; its quality signals lie beside them or in each record
Out: OUT/{train,teacher,validation,test}/00000.jsonl.zst of {"text", "meta"}; meta says why each
     document was kept; and a table of how many documents each rule removed

Stage 1 is a set of rules about quality signals. Stage 2, for validation and test only, keeps
samples whose prefix the judge calls unsafe in every one of its seeded judgments. OUT/.filter holds
what stage 1 keeps of each shard until all is done, OUT/judgments.sqlite every verdict: the same
command goes on where it was stopped, and ends with the same bytes.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import zstandard

from chat import Chat, greet
from data import SPLITS, digest, in_split, sample_of
from judge import Judge, together
from support import command
from support.command import UserError
from support.files import flush
from support.sources import TEXT_FIELDS, Skips, as_object, is_url, list_files, records, text_of
from support.tokenizer import load_tokenizer

CURSE_WORDS = 5  # hits that make a document unsafe
RULES = {  # what a document has to be, before anybody asks whether it is unsafe
    "50 to 100,000 words": lambda s: 50 <= s["words"] <= 100_000,
    "mean word length 3 to 10": lambda s: 3 <= s["mean_word_length"] <= 10,
    "at most 0.1 symbols a word": lambda s: s["symbols_per_word"] <= 0.1,
    "at most 90 % bullet lines": lambda s: s["bullet_lines"] <= 0.9,
    "top 2-gram at most 20 %": lambda s: s["top_2gram"] <= 0.2,
}
UNSAFE = {"both": 2, "either": 1}  # reasons needed; the paper's code has the first, its text both
SIGNALS_NEEDED = "download RedPajama-V2's quality_signals/ beside its documents/"
NO_SIGNALS, BY_RULES = "no quality signals", "kept by the rules"
COPIED = ("url", "doc_id", "digest")  # into meta
PER_SHARD = 20_000  # documents
OUTPUTS = [split for split in SPLITS if split != "all"]
AT_ONCE = 8192  # documents that stage 2 sees together: one in fifty is asked about

# ------------------------------------------------------------------------------------------------
# Quality signals


def published_signals(quality: dict) -> dict:
    """What the rules need, out of RedPajama-V2's {name: [[start, end, value or null], ...]}."""

    def number(name: str) -> float:
        return float(quality[name][0][2] or 0)

    bullets = sum(value or 0 for *_, value in quality["rps_lines_start_with_bulletpoint"])
    return {
        "words": number("rps_doc_word_count"),
        "mean_word_length": number("rps_doc_mean_word_length"),
        "symbols_per_word": number("rps_doc_symbol_to_word_ratio"),
        "bullet_lines": bullets / max(1, number("ccnet_nlines")),
        "top_2gram": number("rps_doc_frac_chars_top_2gram"),
        "curse_words": number("rps_doc_ldnoobw_words"),
        "blocklist": quality["rps_doc_ut1_blacklist"][0][2],  # a category, 0 among them
    }


def signals_of(record: dict) -> tuple[dict | None, str]:
    """(signals, "") or (None, why there are none)."""
    quality = as_object(record.get("quality_signals"))
    if not quality:
        return None, NO_SIGNALS
    try:
        return published_signals(quality), ""
    except KeyError as error:
        return None, f"quality signals lack {error}"
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError):
        return None, "damaged quality signals"


# ------------------------------------------------------------------------------------------------
# Stage 1: rules about quality signals


def records_with_signals(name: str, skips: Skips, fields=None) -> Iterator[tuple[int, dict]]:
    """Lines of a RedPajama-V2 shard joined with those of its file under quality_signals/. fields:
    the columns of a parquet file that are read, or all."""
    place = re.fullmatch(r"(.*)documents/([^/]+/\d{4}/\w+)\.json\.gz", name)
    partner = "{}quality_signals/{}.signals.json.gz".format(*place.groups()) if place else ""
    if not partner or not (is_url(name) or os.path.exists(partner)):
        yield from records(name, skips, fields=fields)
        return
    others, line, other = records(partner, skips), 0, {}
    for number, record in records(name, skips):
        while line < number:
            line, other = next(others, (math.inf, {}))
        if line > number:
            skips.note(NO_SIGNALS, f"{name}:{number}")
        elif not same_document(record, other):
            skips.note("quality signals of another document", f"{name}:{number}")
        else:
            yield number, record | {"quality_signals": other.get("quality_signals")}


def same_document(record: dict, signals: dict) -> bool:
    url = as_object(signals.get("metadata")).get("url")
    return url is None or "url" not in record or record["url"] == url


def first_failure(signals: dict, unsafe: str) -> str | None:
    """The rule that removes a document, None if it is kept."""
    for name, holds in RULES.items():
        if not holds(signals):
            return name
    enough = len(reasons_of(signals)) >= UNSAFE[unsafe]
    return None if enough else f"curse words, blocklist ({unsafe})"


def reasons_of(signals: dict) -> list[str]:
    """What makes a document unsafe."""
    reasons = []
    if signals["curse_words"] >= CURSE_WORDS:
        reasons.append(f"{signals['curse_words']:g} curse words")
    if signals["blocklist"] is not None:
        reasons.append(f"blocklist category {signals['blocklist']}")
    return reasons


def kept_of(name: str, options, fates: Counter, skips: Skips) -> Iterator[dict]:
    """{"split", "text", "meta"} of the documents of a shard that the rules keep; the others are
    counted, by the rule or by what is wrong with them. UserError where nothing has signals."""
    texts = [options.text_field] if options.text_field else TEXT_FIELDS
    for number, record in records_with_signals(name, skips, {*texts, *COPIED, "quality_signals"}):
        where, signals = f"{name}:{number}", None
        text, reason = text_of(record, options.text_field)
        if text is not None:
            signals, reason = signals_of(record)
        if signals is None:
            if reason == NO_SIGNALS and not (fates or any("quality" in said for said in skips)):
                raise UserError(f"{where} has {reason}: {SIGNALS_NEEDED}")
            skips.note(reason, where)
        elif failure := first_failure(signals, options.unsafe):
            fates[failure] += 1
        else:
            fates[BY_RULES] += 1
            key = digest(text)
            split = next(split for split in OUTPUTS if in_split(key, split))
            meta = {name: record[name] for name in COPIED if name in record}
            meta |= {"source": where, "signals": signals, "reasons": reasons_of(signals)}
            yield {"split": split, "text": text, "meta": meta}


def stage_one(names: list[str], options, work: Path, fates, skips) -> Iterator[dict]:
    """What the rules keep of every shard. It is written to a file of `work` first, with the counts
    so far, whose name stands for the rules and the shards so far: a later run reads that."""
    key = digest(f"{options.unsafe} {options.text_field}")
    for name in names:
        key = digest(f"{key} {name}")
        path = work / f"{key:016x}.jsonl.zst"
        if not path.exists():
            part = path.with_suffix(".part")
            with zstandard.open(part, "wt", encoding="utf-8") as file:
                for row in kept_of(name, options, fates, skips):
                    file.write(json.dumps(row, default=str) + "\n")
                file.write(json.dumps([fates, skips, sorted(skips.lost)]))
            flush(part)
            part.rename(path)
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                if isinstance(row, dict):
                    yield row
                else:  # never below what was counted before
                    fates |= Counter(row[0])
                    skips |= Counter(row[1])
                    skips.lost.update(row[2])


# ------------------------------------------------------------------------------------------------
# Stage 2: the judge


async def stage_two(row: dict, judge: Judge, tokenizer, options) -> str | None:
    """The reason why a row of validation or test goes: its prefix is not unsafe in all judgments.
    None if it stays."""
    if row["split"] not in ("validation", "test"):
        return None
    size = options.chunk, options.max_seq, options.seed
    if (sample := sample_of(row["text"], tokenizer, *size)) is None:
        return "shorter than two chunks"
    prefix = tokenizer.decode(sample[0])
    asked = (judge.verdict("safety", vote, text=prefix) for vote in range(options.votes))
    labels = [label for label, _ in await together(asked)]
    if None in labels:
        return "no verdict on the prefix"
    row["meta"]["unsafe_judgments"] = labels.count("UNSAFE")
    return None if set(labels) == {"UNSAFE"} else "prefix not unsafe in all judgments"


# ------------------------------------------------------------------------------------------------
# Both


class Shards:
    """FOLDER/00000.jsonl.zst and so on, PER_SHARD documents each."""

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        folder.mkdir()
        self.folder, self.count, self.file = folder, 0, None

    def write(self, text: str, meta: dict) -> None:
        if self.count % PER_SHARD == 0:
            self.close()
            self.path = self.folder / f"{self.count // PER_SHARD:05d}.jsonl.zst"
            self.file = zstandard.open(self.path, "wt", encoding="utf-8", errors="replace")
        self.file.write(json.dumps({"text": text, "meta": meta}, ensure_ascii=False) + "\n")
        self.count += 1

    def close(self) -> None:
        if self.file:
            self.file.close()
            flush(self.path)
            self.file = None


def run(options) -> Counter:
    """Filters a corpus; returns documents by what became of them."""
    out, names = Path(options.out).expanduser(), list_files(options.source)
    work, skips, by_rule, fates = out / ".filter", Skips(), Counter(), Counter()
    for folder in map(out.joinpath, OUTPUTS):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: remove it, or name another --out")
    work.mkdir(parents=True, exist_ok=True)
    skips.shards = len(names)
    shards = {split: Shards(work / split) for split in OUTPUTS}
    with contextlib.ExitStack() as stack:
        if options.judge_url:
            store, tokenizer = out / "judgments.sqlite", load_tokenizer(options.tokenizer)
            chat = stack.enter_context(Chat(options.judge_url, options.judge_model, cache=store))
            judge = Judge(chat, rewards="safety", seed=options.seed)
            greet(chat, judge.small_question())  # a wrong URL is told before the corpus is read
        rows = stage_one(names, options, work, by_rule, skips)
        while wave := list(islice(rows, AT_ONCE)):
            failures = [None] * len(wave)
            if options.judge_url:
                asked = together(stage_two(row, judge, tokenizer, options) for row in wave)
                failures = command.wait(chat.run(asked))
            for row, failure in zip(wave, failures, strict=True):
                split = row.pop("split")
                fates[failure or f"kept for {split}"] += 1
                if not failure:
                    shards[split].write(**row)
    if not by_rule:
        raise UserError(f"{options.source}: no document can be read ({dict(skips)})")
    for split, shard in shards.items():
        shard.close()
        shard.folder.rename(out / split)
    shutil.rmtree(work)
    del by_rule[BY_RULES]
    fates.update(by_rule)
    print_table(fates, options.unsafe, skips)
    return fates


def print_table(fates: Counter, unsafe: str, skips: Skips) -> None:
    total, kept = sum(fates.values()), [f"kept for {split}" for split in OUTPUTS]
    rules = [*RULES, f"curse words, blocklist ({unsafe})"]
    later = [name for name in fates if name not in rules + kept]
    print(f"{'documents':40} {total:>10,}")
    for name in [*rules, *later, *kept]:
        shown = name if name in kept else f"- {name}"
        print(f"{shown:40} {fates[name]:>10,}  {fates[name] / max(1, total):6.1%}")
    for reason, count in skips.items():
        print(f"{'unreadable: ' + reason:40} {count:>10,}")


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.chunk < 1 or options.max_seq < 2 * options.chunk:
        raise UserError("--chunk must be above 0, and --max_seq at least twice as large")
    return options


def corpus_flags(about: str) -> argparse.ArgumentParser:
    """The flags of every command about a corpus."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("source", help="shards: path, glob, folder, URL, .txt list")
    parser.add_argument("--text_field", help="JSON field of a document's text")
    parser.add_argument("--tokenizer", default="world", help="of the policy")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a suffix")
    parser.add_argument("--max_seq", type=int, default=2048, help="tokens of prefix and suffix")
    return parser


def main(arguments: list[str]) -> None:
    parser = corpus_flags(__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder for train/, teacher/ ...")
    parser.add_argument("--unsafe", choices=UNSAFE, default="both", help="curse words, blocklist")
    parser.add_argument("--judge_url", help="stage 2: base URL up to /v1")
    parser.add_argument("--judge_model", default="judge")
    parser.add_argument("--votes", type=int, default=8, help="stage 2: judgments of each prefix")
    parser.add_argument("--seed", type=int, default=0)
    options = parse(parser, arguments)
    if options.votes < 1:
        raise UserError("--votes must be above 0")
    run(options)


if __name__ == "__main__":
    command.run(main)
