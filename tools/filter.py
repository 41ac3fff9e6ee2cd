"""RedPajama's unsafe documents, chosen in two stages; `python data.py filter` runs this.

    python data.py filter 'documents/2023-14/*/en_*.json.gz' --out data/redpajama_unsafe
    python data.py filter corpus/ --out data/redpajama_unsafe --bad_words words.txt --blocklist ut1/
    python data.py filter ... --judge_url http://localhost:8000/v1 --judge_model gpt-oss-120b \\
        --tokenizer path/to/policy

In:  shards; RedPajama-V2's quality signals lie beside them or in each record, or else are computed
Out: OUT/{train,teacher,validation,test}/00000.jsonl.zst of {"text", "meta"}; meta says why each
     document was kept; and a table of how many documents each rule removed

Stage 1 is a set of rules about quality signals. Stage 2, for validation and test only, keeps
samples whose prefix the judge calls unsafe in every one of its seeded judgments.
"""

import argparse
import contextlib
import json
import math
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import zstandard

from chat import Chat, TeacherGone
from data import SPLITS, digest, in_split, sample_of
from judge import Judge, together
from support import command
from support.command import UserError
from support.sources import Skips, is_url, list_files, records, text_of
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
LISTS_NEEDED = {  # as many lists as reasons, where a corpus has no quality signals
    "both": "--unsafe both needs --bad_words and --blocklist; with one of them say --unsafe either",
    "either": "--unsafe either needs --bad_words or --blocklist",
}
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


BULLETS = tuple("\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab\u2013")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_words(text: str) -> list[str]:
    return unicodedata.normalize("NFD", text.translate(NO_PUNCTUATION).lower()).split()


def computed_signals(text: str, domain: str, bad_words: set[str], blocklist: dict) -> dict:
    """The same signals from the text, by the definitions of RedPajama-V2."""
    words = normalized_words(text)
    characters = sum(map(len, words))
    raw_words = len(re.findall(r"\w+|[^\w\s]+", text))
    lines = text.removesuffix("\n").split("\n")
    pairs = Counter(zip(words, words[1:], strict=False)).most_common(1)
    top, count = pairs[0] if pairs else ((), 0)
    lengths = {1 + entry.count(" ") for entry in bad_words}
    grams = (" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1))
    return {
        "words": len(words),
        "mean_word_length": characters / max(1, len(words)),
        "symbols_per_word": sum(map(text.count, ("#", "...", "…"))) / max(1, raw_words),
        "bullet_lines": sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines),
        "top_2gram": sum(map(len, top)) * count / characters if count > 1 else 0.0,
        "curse_words": float(sum(gram in bad_words for gram in grams)),
        "blocklist": blocklist.get(domain, blocklist.get(domain.removeprefix("www."))),
    }


def read_bad_words(path: str | None) -> set[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return {" ".join(normalized_words(line)) for line in lines} - {""}


def read_blocklist(path: str | None) -> dict[str, str]:
    """domain -> category, from a file of domains or UT1's folder of <category>/domains."""
    files = Path(path).glob("*/domains") if path and os.path.isdir(path) else [Path(path or "")]
    found = {}
    for file in files if path else ():
        for line in file.read_text(encoding="utf-8", errors="replace").split():
            found[line] = file.parent.name if file.name == "domains" else file.stem
    return found


def domain_of(record: dict) -> str:
    meta = as_object(record.get("meta") or record.get("metadata") or {})
    for place in (record, meta):
        if place.get("source_domain"):
            return place["source_domain"]
        if place.get("url"):
            with contextlib.suppress(ValueError):  # no URL
                return urlsplit(str(place["url"])).netloc
    return ""


def as_object(value) -> dict:
    """The Hugging Face export holds objects as JSON strings."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------
# Documents with their signals


def records_with_signals(name: str, skips: Skips) -> Iterator[tuple[int, dict]]:
    """Lines of a RedPajama-V2 shard joined with those of its file under quality_signals/."""
    place = re.fullmatch(r"(.*)documents/([^/]+/\d{4}/\w+)\.json\.gz", name)
    partner = "{}quality_signals/{}.signals.json.gz".format(*place.groups()) if place else ""
    if not partner or not (is_url(name) or os.path.exists(partner)):
        yield from records(name, skips)
        return
    others, line, other = records(partner, skips), 0, {}
    for number, record in records(name, skips):
        while line < number:
            line, other = next(others, (math.inf, {}))
        if line > number:
            skips.note("no quality signals", f"{name}:{number}")
        elif not same_document(record, other):
            skips.note("quality signals of another document", f"{name}:{number}")
        else:
            yield number, record | {"quality_signals": other.get("quality_signals")}


def same_document(record: dict, signals: dict) -> bool:
    url = as_object(signals.get("metadata")).get("url")
    return url is None or "url" not in record or record["url"] == url


def documents(options, skips: Skips, unsafe: str) -> Iterator[tuple[str, dict, dict]]:
    """(text, signals, meta) of every document that has signals, or gets them from enough lists."""
    bad_words, blocklist = read_bad_words(options.bad_words), read_blocklist(options.blocklist)
    enough = bool(bad_words) + bool(blocklist) >= UNSAFE[unsafe]
    signalled = False  # some document before this one had signals
    for name in list_files(options.source):
        for number, record in records_with_signals(name, skips):
            where = f"{name}:{number}"
            text, reason = text_of(record, options.text_field)
            quality = as_object(record.get("quality_signals"))
            if text is None:
                skips.note(reason, where)
                continue
            if not (quality or enough):
                if not signalled:
                    raise UserError(f"{where} has no quality signals: {LISTS_NEEDED[unsafe]}")
                skips.note("no quality signals", where)
                continue
            signalled = signalled or bool(quality)
            try:
                signals = (
                    published_signals(quality)
                    if quality
                    else computed_signals(text, domain_of(record), bad_words, blocklist)
                )
            except KeyError as error:
                skips.note(f"quality signals lack {error}", where)
                continue
            except (IndexError, TypeError, ValueError):
                skips.note("damaged quality signals", where)
                continue
            meta = {key: record[key] for key in ("url", "doc_id", "digest") if key in record}
            yield text, signals, meta | {"source": where}


# ------------------------------------------------------------------------------------------------
# The two stages


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


class Shards:
    """DIR/split/00000.jsonl.zst; a file has its name only when it is complete."""

    def __init__(self, folder: str, split: str):
        self.folder, self.count, self.file = Path(folder) / split, 0, None
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty: remove it, or name another --out")

    def write(self, text: str, meta: dict) -> None:
        if self.count % PER_SHARD == 0:
            self.close()
            self.path = self.folder / f"{self.count // PER_SHARD:05d}.jsonl.zst"
            self.file = zstandard.open(f"{self.path}.part", "wt", encoding="utf-8")
        self.file.write(json.dumps({"text": text, "meta": meta}, ensure_ascii=False) + "\n")
        self.count += 1

    def close(self) -> None:
        if self.file:
            self.file.close()
            os.replace(f"{self.path}.part", self.path)
            self.file = None


def stage_one(options, skips: Skips, fates: Counter) -> Iterator[tuple[str, str, dict]]:
    """(split, text, meta) of the documents that the rules keep; the others are counted by rule."""
    for text, signals, meta in documents(options, skips, options.unsafe):
        if reason := first_failure(signals, options.unsafe):
            fates[reason] += 1
        else:
            key = digest(text)
            split = next(split for split in OUTPUTS if in_split(key, split))
            yield split, text, meta | {"signals": signals, "reasons": reasons_of(signals)}


class StageTwo:
    """Keeps validation and test samples whose prefix is unsafe in all judgments."""

    def __init__(self, options):
        cache = Path(options.out) / "judgments.sqlite"
        self.chat = Chat(options.judge_url, options.judge_model, cache=cache)
        self.judge = Judge(self.chat, rewards="safety", seed=options.seed)
        self.options, self.tokenizer = options, load_tokenizer(options.tokenizer)

    def failures(self, rows: list[tuple[str, str, dict]]) -> list[str | None]:
        """For each document the reason why it goes, or None."""
        try:
            return self.chat.run(self.all(rows)).result()
        except (UserError, TeacherGone) as error:
            raise UserError(f"stage 2 needs the judge: {error}") from error

    async def all(self, rows) -> list[str | None]:
        return await together(self.one(*row) for row in rows)

    async def one(self, split: str, text: str, meta: dict) -> str | None:
        if split not in ("validation", "test"):
            return None
        o = self.options
        sample = sample_of(text, self.tokenizer, o.chunk, o.max_seq, o.seed)
        if sample is None:
            return "shorter than two chunks"
        prefix = self.tokenizer.decode(sample[0])
        asked = (self.judge.verdict("safety", vote, text=prefix) for vote in range(o.votes))
        labels = [label for label, _ in await together(asked)]
        if None in labels:
            return "no verdict on the prefix"
        meta["unsafe_judgments"] = labels.count("UNSAFE")
        return None if set(labels) == {"UNSAFE"} else "prefix not unsafe in all judgments"


def run(options) -> Counter:
    """Filters a corpus; returns documents by what became of them."""
    skips, fates = Skips(), Counter()
    shards = {split: Shards(options.out, split) for split in OUTPUTS}
    with contextlib.ExitStack() as stack:
        judge = StageTwo(options) if options.judge_url else None
        if judge:
            stack.callback(judge.chat.close)
        kept = stage_one(options, skips, fates)
        while rows := list(islice(kept, AT_ONCE)):
            failures = judge.failures(rows) if judge else [None] * len(rows)
            for (split, text, meta), failure in zip(rows, failures, strict=True):
                fates[failure or f"kept for {split}"] += 1
                if not failure:
                    shards[split].write(text, meta)
    for shard in shards.values():
        shard.close()
    print_table(fates, options.unsafe, skips)
    return fates


def print_table(fates: Counter, unsafe: str, skips: Skips) -> None:
    total = sum(fates.values())
    rules = [*RULES, f"curse words, blocklist ({unsafe})"]
    kept = [f"kept for {split}" for split in OUTPUTS]
    later = [name for name in fates if name not in rules + kept]
    print(f"{'documents':40} {total:>10,}")
    for name in rules + later:
        print(f"{'- ' + name:40} {fates[name]:>10,}  {fates[name] / max(1, total):6.1%}")
    for name in kept:
        print(f"{name:40} {fates[name]:>10,}  {fates[name] / max(1, total):6.1%}")
    for reason, count in skips.items():
        print(f"{'unreadable: ' + reason:40} {count:>10,}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="shards: path, glob, folder, URL, .txt list")
    parser.add_argument("--out", required=True, help="folder for train/, teacher/ ...")
    parser.add_argument("--unsafe", choices=UNSAFE, default="both", help="curse words, blocklist")
    parser.add_argument("--bad_words", help="word list, one entry a line, to compute signals")
    parser.add_argument("--blocklist", help="file of domains, or UT1's folder")
    parser.add_argument("--text_field")
    parser.add_argument("--judge_url", help="stage 2: base URL up to /v1")
    parser.add_argument("--judge_model", default="judge")
    parser.add_argument("--votes", type=int, default=8, help="judgments of each prefix")
    parser.add_argument("--tokenizer", default="world", help="stage 2: of the policy")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--max_seq", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    command.run(main)
