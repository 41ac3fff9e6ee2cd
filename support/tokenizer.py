"""Text to token ids and back, for every vocabulary this repository meets.

    load_tokenizer("world")        the pocket world's words; nothing is downloaded
    load_tokenizer("hf_folder")    its tokenizer.json (GPT-2, Llama 3, SmolLM2) or tokenizer.model
    load_tokenizer("gpt2")         an encoding that tiktoken knows by name and downloads

Byte-level BPE runs on tiktoken, several times faster than the `tokenizers` library. tiktoken joins
any two neighbours whose concatenation is a token, lowest rank first; a tokenizer.json lists the
pairs that may join. `ranks_from_merges` builds the ranks with which both do the same. What it can't
convert (a sentencepiece vocabulary, an unknown pre-tokenizer) runs on `tokenizers` instead.

Ordinary text never becomes a special token, even where it spells one.
"""

import base64
import contextlib
import json
import logging
import math
import re
import shutil
from pathlib import Path

import regex
import tiktoken

from support.hub import local_folder

log = logging.getLogger(__name__)

# How text is cut into pieces before merging. SmolLM2 isolates every digit first, so a run of spaces
# before a digit isn't split the way GPT-2 splits it before a letter.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORLD_PATTERN = r" ?\S+|\s"  # words as they stand between spaces

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # if no config names the token
SIBLINGS = (  # files that belong to a tokenizer.json
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
LONG_SPACE = 100_000  # characters
LARGEST_FILE = 256 << 20  # bytes of a tokenizer's file; the largest in use have about 35 MB
LARGEST_ID = 2**24  # a table of that length is made
LONGEST_TOKEN = 2**12  # bytes; working out how a token is merged takes the square of it


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols, spare = {byte: chr(byte) for byte in printable}, 256
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(spare)
            spare += 1
    return [symbols[byte] for byte in range(256)]


SYMBOLS = byte_symbols()
BYTE_OF = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


def to_symbols(token: bytes) -> str:
    return "".join(SYMBOLS[byte] for byte in token)


def to_bytes(symbols: str) -> bytes:
    return bytes(BYTE_OF[symbol] for symbol in symbols)


class Tokenizer:
    """Byte-level BPE on tiktoken.

    ranks: id of each ordinary token that merging can reach; specials: id of each special token;
    eos: name of the one that ends a document; bos: of the one that the tokenizer itself puts before
    a text, None where it puts none; vocabulary: all ordinary tokens; source: its tokenizer.json.
    """

    def __init__(self, ranks, pattern, specials, eos, bos=None, vocabulary=None, source=None):
        self.pattern, self.specials, self.source = pattern, specials, source
        self.vocabulary = vocabulary or ranks
        self.vocab_size = 1 + max(*self.vocabulary.values(), *specials.values())
        self.token_bytes = [b""] * self.vocab_size  # special tokens are nothing in a text
        for token, i in self.vocabulary.items():
            self.token_bytes[i] = token
        self.eos_name, self.bos_name = eos, bos
        self.eos, self.bos = specials[eos], specials[bos] if bos else None
        self.splits_words = all(len(token.split()) < 2 for token in self.vocabulary)
        # tiktoken needs all 256 bytes; those that a vocabulary lacks get ids beyond it
        absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        stand_ins = {byte: self.vocab_size + i for i, byte in enumerate(absent)}
        self.absent, self.library = absent, None
        self.encoding = tiktoken.Encoding(
            "ordinary text", pat_str=pattern, mergeable_ranks=ranks | stand_ins, special_tokens={}
        )

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """continues: as for LibraryTokenizer; here a text is cut alike wherever it stands."""
        if len(text) > LONG_SPACE and (run := re.search(rf"\s{{{LONG_SPACE}}}", text)):
            middle = run.start() + LONG_SPACE // 2  # the pattern's look-ahead would overflow
            return self.encode(text[:middle]) + self.encode(text[middle:])
        ids = self.encoding.encode_ordinary(text)
        if self.absent and ids and max(ids) >= self.vocab_size:
            return self.encode_absent(text, ids)
        return ids

    def encode_absent(self, text: str, ids: list[int]) -> list[int]:
        """A byte outside the vocabulary is dropped, and what was around it may merge."""
        with contextlib.suppress(ImportError):
            if self.library is None:
                spec = json.loads(self.source.read_text(encoding="utf-8"))
                self.library = LibraryTokenizer(spec, self.eos_name, self.bos_name, self.source)
            return self.library.encode(text)
        return [i for i in ids if i < self.vocab_size]

    def decode(self, ids) -> str:
        """Special tokens and ids outside the vocabulary are dropped."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if max(ids, default=0) >= self.vocab_size:  # of a model whose vocabulary was padded
            ids = [i for i in ids if i < self.vocab_size]
        data = b"".join(map(self.token_bytes.__getitem__, ids))
        return data.decode("utf-8", errors="replace")

    def save(self, folder) -> None:
        """Write what transformers, vLLM and llama.cpp read; originals are copied untouched."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.source is None:
            text = json.dumps(self.to_json(), ensure_ascii=False)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        elif self.source.parent.resolve() != folder.resolve():
            shutil.copy(self.source, folder / "tokenizer.json")
            for name in SIBLINGS:
                if (self.source.parent / name).exists():
                    shutil.copy(self.source.parent / name, folder / name)
        if not (folder / "tokenizer_config.json").exists():
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "eos_token": self.eos_name,
                "bos_token": self.bos_name,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

    def to_json(self) -> dict:
        """tokenizer.json with every merge that tiktoken would do, lowest rank first."""
        merges = []
        for token, rank in sorted(self.vocabulary.items(), key=lambda item: item[1]):
            halves = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += [
                [to_symbols(left), to_symbols(right)]
                for left, right in halves
                if self.vocabulary.get(left, rank) < rank > self.vocabulary.get(right, rank)
            ]
        # tiktoken's patterns have possessive quantifiers; without them they match the same text
        pattern = self.pattern.replace("{1,3}+", "{1,3}").replace("$", r"\z")
        for sign in "+*?":
            pattern = pattern.replace(f"{sign}+", sign)
        added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        byte_level["trim_offsets"] = True
        split: dict = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        split["invert"] = False
        template = bos_template(self.bos_name, self.bos) if self.bos_name else None
        return {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": name, **added, "special": True}
                for name, i in sorted(self.specials.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": template,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "ignore_merges": True,
                "vocab": {to_symbols(token): i for token, i in self.vocabulary.items()},
                "merges": merges,
            },
        }


def bos_template(name: str, token_id: int) -> dict:
    special, text = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, special, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }


class LibraryTokenizer:
    """The same interface on the `tokenizers` library, for files that tiktoken can't reproduce."""

    def __init__(self, spec: dict, eos: str, bos: str | None, source: Path):
        from tokenizers import Tokenizer as Library

        self.source, self.eos_name, self.bos_name = source, eos, bos
        self.specials = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        # Without their entries under added_tokens, special tokens are ordinary text to the encoder.
        ordinary = [t for t in spec["added_tokens"] if not t["special"]]
        plain = spec | {"added_tokens": ordinary, "post_processor": None}
        plain |= {"truncation": None, "padding": None}
        # A leading space belongs to a continuation, so decoding must keep it.
        decoder = plain.get("decoder") or {}
        if decoder.get("type") == "Sequence":
            kept = [d for d in decoder["decoders"] if d["type"] != "Strip"]
            plain["decoder"] = {"type": "Sequence", "decoders": kept}
        self.library = Library.from_str(json.dumps(plain))
        whole = Library.from_str(json.dumps(spec))
        self.eos, self.bos = whole.token_to_id(eos), whole.token_to_id(bos) if bos else None
        self.vocab_size = 1 + max(whole.get_vocab(with_added_tokens=True).values())
        self.splits_words = False  # not known of these
        # Sentencepiece puts a space before every text; a text that brings its own needs no second.
        tokens = self.library.encode("a").tokens
        self.brings_space = bool(tokens) and tokens[0].startswith("▁")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """continues: the text stands right behind another, so no space may be put before it."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        lead = 0
        if self.brings_space and text.startswith(" "):
            text = text[1:]
        elif self.brings_space and continues:  # behind a line break, whose tokens are cut off
            text, lead = "\n" + text, len(self.library.encode("\n", add_special_tokens=False))
        return self.library.encode(text, add_special_tokens=False).ids[lead:]

    def decode(self, ids) -> str:
        special = set(self.specials.values())
        return self.library.decode([int(i) for i in ids if int(i) not in special])

    save = Tokenizer.save


# ------------------------------------------------------------------------------------------------
# Conversion of a tokenizer.json


def merge_all(token: bytes, ranks: dict[bytes, int], below: float = math.inf) -> list[bytes]:
    """What tiktoken makes of one piece: join the lowest-ranked neighbours until none is left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        lowest = min(pairs)
        if lowest >= below:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def ranks_from_merges(vocab: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole: bool):
    """Token ids as tiktoken ranks, or None where those can't reproduce the merges.

    Merging is local: two neighbours (a, b) can meet in a text only if merging the string a+b by the
    earlier merges alone ends in exactly [a, b]. So one pair at most can ever make a token, and the
    merges of any other pair are dead; a token whose own pair isn't listed is never made at all.
    whole: a piece that is a token is taken unmerged (ignore_merges), so unmade tokens matter too.
    """
    ranks = {token: i for token, i in vocab.items() if len(token) == 1}
    last, token, parts, early = -1, b"", [], []
    for left, right in merges:
        if left not in ranks or right not in ranks:
            early.append((left, right))
        if left + right != token:
            token = left + right
            parts = merge_all(token, ranks)
        if token not in ranks and parts == [left, right]:
            if vocab[token] < last:
                return None  # joined in another order than that of the ids
            ranks[token] = last = vocab[token]
    for left, right in early:  # dead too, if its token is made before the later of its parts
        if left in ranks and right in ranks:
            made = ranks.get(left + right, math.inf)
            if made > max(ranks[left], ranks[right]):
                return None
    if not whole:
        return ranks
    for token in vocab.keys() - ranks.keys():
        if len(merge_all(token, vocab, below=vocab[token])) < 3:
            return None  # tiktoken would join what the file doesn't
    return dict(vocab)


def split_pattern(spec: dict) -> str | None:
    """The one regular expression that cuts text as the file's pre-tokenizers do."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    first, regex = steps[:-1], steps[-1].get("use_regex", True)
    if not first and regex:
        return GPT2_PATTERN
    if len(first) != 1:
        return None
    if first[0]["type"] == "Digits" and first[0]["individual_digits"] and regex:
        return DIGITS_PATTERN
    if first[0]["type"] == "Split" and not regex:
        isolated = first[0]["behavior"] == "Isolated" and not first[0]["invert"]
        return first[0]["pattern"].get("Regex") if isolated else None
    return None


def covers_all_text(pattern: str) -> bool:
    """tiktoken drops what a pattern doesn't match; elsewhere that is a piece of its own. On a
    pattern that matches an empty piece it panics."""
    single = {bytes([byte]): byte for byte in range(256)}
    probe = "Ab ab'S  12\n3456\t_-!? \r\n\n é日本 ½\u3000\u200d👍\0\x85 "
    try:
        if not all(match[0] for match in regex.finditer(pattern, probe)):
            return False
        only = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=single, special_tokens={})
    except (ValueError, regex.error):  # one that can't be read
        return False
    return bytes(only.encode_ordinary(probe)) == probe.encode()


def convert(spec: dict, eos: str, bos: str | None, source: Path) -> Tokenizer | None:
    """A tokenizer.json on tiktoken with identical ids, or None."""
    model, pattern = spec["model"], split_pattern(spec)
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in options):
        return None
    if spec.get("normalizer") or pattern is None or not covers_all_text(pattern):
        return None
    if not all(token["special"] for token in spec["added_tokens"]):
        return None
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab = {to_bytes(t): i for t, i in model["vocab"].items() if t not in specials}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
    ranks = ranks_from_merges(vocab, merges, whole=model.get("ignore_merges", False))
    if ranks is None:
        return None
    return Tokenizer(ranks, pattern, specials, eos, bos, vocabulary=vocab, source=source)


# ------------------------------------------------------------------------------------------------
# Sources of tokenizers


def load_tokenizer(name: str) -> Tokenizer | LibraryTokenizer:
    """name: "world", a folder (or its hf:// or https URL), a tokenizer.json or .model, or an
    encoding of tiktoken's."""
    if name == "world":
        from world import corpus

        return from_words(corpus.vocabulary())
    path = local_folder(name, weights=False)
    if path.is_dir():
        files = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((file for file in files if file.exists()), files[0])
    if path.suffix == ".json":
        return from_tokenizer_json(path)
    if path.suffix == ".model":
        return from_llama3_model(path)
    if name in tiktoken.list_encoding_names():
        known = tiktoken.get_encoding(name)
        specials = known._special_tokens
        return Tokenizer(known._mergeable_ranks, known._pat_str, specials, "<|endoftext|>")
    raise ValueError(
        f"there is no folder {name}, and no tokenizer of that name: give a folder with "
        f"tokenizer.json or tokenizer.model, 'world', "
        f"or one of {', '.join(tiktoken.list_encoding_names())}"
    )


def from_words(words: list[str]) -> Tokenizer:
    """One token for each word, alone and after a space; anything else falls back to bytes."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [form.encode() for word in words for form in (word, " " + word)]
    tokens = sorted(dict.fromkeys(tokens), key=len)  # parts before the words they make
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(ranks, WORLD_PATTERN, {"<|endoftext|>": len(ranks)}, "<|endoftext|>")


def from_tokenizer_json(path: Path) -> Tokenizer | LibraryTokenizer:
    try:
        spec = json.loads(read_bounded(path))
        check_ids(spec)
        eos, bos = end_and_start(spec, path.parent)
        converted = convert(spec, eos, bos, path)
        if converted is None:
            log.warning("%s can't run on tiktoken, so it runs on `tokenizers`, more slowly", path)
            return LibraryTokenizer(spec, eos, bos, path)
        return converted
    except ImportError:
        raise ValueError(f"{path} needs a library: pip install tokenizers") from None
    except Exception as error:  # the library raises bare ones
        why = error if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(f"{path} is not a readable tokenizer.json: {why!s:.300}") from error


def read_bounded(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE >> 20} MiB")
    return path.read_bytes()


def check_ids(spec: dict) -> None:
    """Refuse ids that are no ids, or for which a table could not be held; ValueError."""
    vocab = spec["model"]["vocab"]
    entries = vocab.items() if isinstance(vocab, dict) else ()  # a list in a unigram model
    found = [*entries, *((token["content"], token["id"]) for token in spec["added_tokens"])]
    for token, number in found:
        if not isinstance(token, str) or len(token) > LONGEST_TOKEN:
            raise ValueError(f"{token!r:.80} is no token of at most {LONGEST_TOKEN} characters")
        if type(number) is not int or not 0 <= number < LARGEST_ID:
            raise ValueError(
                f"the id of {token!r:.80} must be below {LARGEST_ID}, is {number!r:.80}"
            )
    if len({number for _, number in entries}) < len(entries):
        raise ValueError("two tokens of its vocabulary have the same id")


def end_and_start(spec: dict, folder: Path) -> tuple[str, str | None]:
    """Name of the token that ends a text, and of the one that the tokenizer puts before it."""
    config_file = folder / "tokenizer_config.json"
    config = json.loads(read_bounded(config_file)) if config_file.exists() else {}
    eos, bos = config.get("eos_token"), config.get("bos_token")
    eos, bos = (t["content"] if isinstance(t, dict) else t for t in (eos, bos))
    names = [token["content"] for token in spec["added_tokens"]]
    eos = eos or next((name for name in END_OF_TEXT if name in names), None)
    if eos is None or eos not in names:
        raise ValueError(f"{folder}: can't tell which of {names[:9]} ends a text (eos_token)")
    template = json.dumps(spec.get("post_processor"))
    templated = f'"SpecialToken": {{"id": {json.dumps(bos)}' in template
    return eos, bos if bos and config.get("add_bos_token", templated) else None


def from_llama3_model(path: Path) -> Tokenizer:
    """Lines of base64 token and rank, as Meta publishes Llama 3."""
    ranks = {}
    for line in read_bounded(path).splitlines():
        if not re.fullmatch(rb"(?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/=]{4} \d{1,7}", line):
            raise ValueError(f"{path} is no Llama-3 tokenizer.model; is there a tokenizer.json?")
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
    named |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    spare = iter(range(256))
    specials = {}
    for i in range(256):
        name = named.get(i) or f"reserved_special_token_{next(spare)}"
        specials[f"<|{name}|>"] = len(ranks) + i
    eos, bos = "<|end_of_text|>", "<|begin_of_text|>"
    return Tokenizer(ranks, LLAMA3_PATTERN, specials, eos, bos)
