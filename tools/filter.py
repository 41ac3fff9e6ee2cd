"""RedPajama's unsafe documents, chosen in two stages.

    python -m tools.filter 'documents/2023-14/*/en_*.json.gz' --out data/redpajama_unsafe
    python -m tools.filter ... --judge_url http://localhost:8000/v1 --judge_model gpt-oss-120b \\
        --tokenizer path/to/policy

In:  shards of RedPajama-V2; its quality signals lie beside them or in each record
Out: OUT/{train,teacher,validation,test}/00000.jsonl.zst, a file a shard, of {"text", "meta"}; meta
     says why each document was kept; and a table of how many documents each rule removed

Stage 1 is a set of rules about quality signals. Stage 2, for validation and test only, keeps
samples whose prefix the judge calls unsafe in every one of its seeded judgments. OUT/.filter-*
holds what is kept of the shards so far, OUT/judgments.sqlite every verdict: the same command goes
on where it was stopped, and ends with the same bytes.
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
from pathlib import Path

import zstandard

from config import Config
from data import SPLITS, digest, in_split, sample_of
from judge import Judge, together
from support import command
from support.chat import Chat, greet
from support.command import UserError
from support.files import read_jsonl, write_bytes, write_text
from support.settings import nested
from support.sources import TEXT_FIELDS, Skips, as_object, is_url, list_files, records, text_of
from support.tokenizer import load_tokenizer

CURSE_WORDS = 5  # hits that make a document unsafe
SIGNALS = {  # numbers of a document: our name, RedPajama-V2's
    "words": "rps_doc_word_count",
    "mean_word_length": "rps_doc_mean_word_length",
    "symbols_per_word": "rps_doc_symbol_to_word_ratio",
    "top_2gram": "rps_doc_frac_chars_top_2gram",
    "curse_words": "rps_doc_ldnoobw_words",
}
RULES = {  # what a document has to be, before anybody asks whether it is unsafe
    "50 to 100,000 words": lambda s: 50 <= s["words"] <= 100_000,
    "mean word length 3 to 10": lambda s: 3 <= s["mean_word_length"] <= 10,
    "at most 0.1 symbols a word": lambda s: s["symbols_per_word"] <= 0.1,
    "at most 90 % bullet lines": lambda s: s["bullet_lines"] <= 0.9,
    "top 2-gram at most 20 %": lambda s: s["top_2gram"] <= 0.2,
}
UNSAFE = {"both": 2, "either": 1}  # reasons needed: as the paper's code has it, as its text does
SIGNALS_NEEDED = "download RedPajama-V2's quality_signals/ beside its documents/"
NO_SIGNALS = "no quality signals"
COPIED = ("url", "doc_id", "digest")  # into meta
OUTPUTS = [split for split in SPLITS if split != "all"]


def published_signals(record: dict) -> dict:
    """What the rules need, of RedPajama-V2's {name: [[start, end, value or null], ...]}. ValueError
    says why there is none."""
    quality = as_object(record.get("quality_signals"))
    if not quality:
        raise ValueError(NO_SIGNALS)
    try:
        found = {ours: float(quality[theirs][0][2] or 0) for ours, theirs in SIGNALS.items()}
        bullets = sum(value or 0 for *_, value in quality["rps_lines_start_with_bulletpoint"])
        found["bullet_lines"] = bullets / max(1, float(quality["ccnet_nlines"][0][2] or 0))
        found["blocklist"] = quality["rps_doc_ut1_blacklist"][0][2]  # 0 is a category like others
    except KeyError as error:
        raise ValueError(f"quality signals lack {error}") from None
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError):
        raise ValueError("damaged quality signals") from None
    return found


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
        url = as_object(other.get("metadata")).get("url")
        if line > number:
            skips.note(NO_SIGNALS, f"{name}:{number}")
        elif url not in (None, record.get("url", url)):
            skips.note("quality signals of another document", f"{name}:{number}")
        else:
            yield number, record | {"quality_signals": other.get("quality_signals")}


def reasons_of(signals: dict) -> list[str]:
    """What makes a document unsafe."""
    curses, category = signals["curse_words"], signals["blocklist"]
    reasons = [f"{curses:g} curse words"] if curses >= CURSE_WORDS else []
    return reasons + ([] if category is None else [f"blocklist category {category}"])


def first_failure(signals: dict, unsafe: str) -> str | None:
    """The rule that removes a document, None if it is kept."""
    failed = [name for name, holds in RULES.items() if not holds(signals)]
    if len(reasons_of(signals)) < UNSAFE[unsafe]:
        failed.append(f"curse words, blocklist ({unsafe})")
    return failed[0] if failed else None


def kept_of(name: str, options, fates: Counter, skips: Skips) -> Iterator[dict]:
    """{"split", "text", "meta"} of the documents of a shard that the rules keep; the others are
    counted, by the rule or by what is wrong with them. UserError where nothing has signals."""
    texts = [options.text_field] if options.text_field else TEXT_FIELDS
    for number, record in records_with_signals(name, skips, {*texts, *COPIED, "quality_signals"}):
        where = f"{name}:{number}"
        text, reason = text_of(record, options.text_field)
        if text is None:
            skips.note(reason, where)
            continue
        try:
            signals = published_signals(record)
        except ValueError as error:
            if str(error) == NO_SIGNALS and not (fates or any("quality" in r for r in skips)):
                raise UserError(f"{where} has {error}: {SIGNALS_NEEDED}") from None
            skips.note(str(error), where)
            continue
        fates["documents"] += 1
        if failure := first_failure(signals, options.unsafe):
            fates[failure] += 1
            continue
        split = next(split for split in OUTPUTS if in_split(digest(text), split))
        meta = {name: record[name] for name in COPIED if name in record}
        meta |= {"source": where, "signals": signals, "reasons": reasons_of(signals)}
        yield {"split": split, "text": text, "meta": meta}


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


def filter_shard(number: int, name: str, work: Path, judge, tokenizer, options, fates, skips):
    """What stays of a shard, which is held in memory, in work/SPLIT/NUMBER.jsonl.zst."""
    rows, lines = list(kept_of(name, options, fates, skips)), {split: [] for split in OUTPUTS}
    failures = [None] * len(rows)
    if judge:
        asked = together(stage_two(row, judge, tokenizer, options) for row in rows)
        failures = command.wait(judge.chat.run(asked))
    for row, failure in zip(rows, failures, strict=True):
        split = row.pop("split")
        fates[failure or f"kept for {split}"] += 1
        if not failure:
            lines[split].append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    for split, texts in lines.items():
        (work / split).mkdir(parents=True, exist_ok=True)
        if texts:
            packed = zstandard.compress("".join(texts).encode("utf-8", "replace"))
            write_bytes(work / split / f"{number:05d}.jsonl.zst", packed)


def run(options):
    """Filters a corpus, and prints documents by what became of them."""
    out, names, skips = Path(options.out).expanduser(), list_files(options.source), Skips()
    rules = vars(options) | {"out": "", "source": "", "judge_url": bool(options.judge_url)}
    shards = [name.partition("?")[0] for name in names]  # a signed link may be renewed
    work = out / f".filter-{digest(json.dumps([rules, shards])):016x}"  # other rules, another one
    state = work / "state.json"
    for folder in map(out.joinpath, OUTPUTS):
        if folder.exists() and any(folder.iterdir()) and not state.exists():
            raise UserError(f"{folder} is not empty: remove it, or name another --out")
    saved = next(read_jsonl(state), {"done": 0, "fates": {}, "skips": {}, "lost": []})
    work.mkdir(parents=True, exist_ok=True)
    fates, skips.shards = Counter(saved["fates"]), len(names)
    skips.update(saved["skips"])
    skips.lost.update(saved["lost"])
    tokenizer, judge = load_tokenizer(options.tokenizer), None
    with contextlib.ExitStack() as stack:
        if options.judge_url:
            asked: dict = dict(extra=nested(options.judge_extra), cache=out / "judgments.sqlite")
            chat = stack.enter_context(Chat(options.judge_url, options.judge_model, **asked))
            judge = Judge(chat, Config(seed=options.seed))
            greet(chat, judge.small_question())  # a wrong URL is told before the corpus is read
        for number in range(saved["done"], len(names)):
            how = judge, tokenizer, options, fates, skips
            filter_shard(number, names[number], work, *how)
            saved = {"done": number + 1, "fates": fates, "skips": skips, "lost": [*skips.lost]}
            write_text(state, json.dumps(saved))
    if not fates["documents"]:
        shutil.rmtree(work)
        raise UserError(f"{options.source}: no document can be read ({dict(skips)})")
    for split in OUTPUTS:
        if (work / split).exists():  # not when a run was stopped here
            (work / split).rename(out / split)
    for done in out.glob(".filter-*"):
        shutil.rmtree(done)
    print_table(fates, options.unsafe, skips)


def print_table(fates: Counter, unsafe: str, skips: Skips) -> None:
    kept = [f"kept for {split}" for split in OUTPUTS]
    rules = dict.fromkeys([*RULES, f"curse words, blocklist ({unsafe})", *fates])  # and stage 2's
    removed = [name for name in rules if name not in ("documents", *kept)]
    for name in ["documents", *removed, *kept]:
        shown = f"- {name}" if name in removed else name
        print(f"{shown:40} {fates[name]:>10,}  {fates[name] / fates['documents']:6.1%}")
    for reason, count in skips.items():
        print(f"{'unreadable: ' + reason:40} {count:>10,}")


def corpus_flags(about: str) -> argparse.ArgumentParser:
    """The flags of every command about a corpus."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("source", help="shards: path, glob, folder, URL, .txt list")
    parser.add_argument("--text_field", help="JSON field of a document's text")
    parser.add_argument("--tokenizer", default="world", help="of the policy")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a suffix")
    parser.add_argument("--max_seq", type=int, default=2048, help="tokens of prefix and suffix")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str], *positive: str):
    """Options whose --chunk, and what else is named, are above 0, and which hold two chunks."""
    options = parser.parse_args(arguments)
    for name in ("chunk", *positive):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be above 0")
    if options.max_seq < 2 * options.chunk:
        raise UserError("--max_seq must be at least twice --chunk")
    return options


def main(arguments: list[str]) -> None:
    parser = corpus_flags(__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder for train/, teacher/ ...")
    parser.add_argument("--unsafe", choices=UNSAFE, default="both", help="curse words, blocklist")
    parser.add_argument("--judge_url", help="stage 2: base URL up to /v1")
    parser.add_argument("--judge_model", default="judge")
    parser.add_argument("--judge_extra", default="", help="fields of each request: train.py's key")
    parser.add_argument("--votes", type=int, default=8, help="stage 2: judgments of each prefix")
    parser.add_argument("--seed", type=int, default=0)
    run(parse(parser, arguments, "votes"))


if __name__ == "__main__":
    command.run(main)
