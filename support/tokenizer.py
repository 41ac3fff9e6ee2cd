"""Text to token ids and back, for every vocabulary this repository meets.

    load_tokenizer("hf_folder")     its tokenizer.json (Llama 2 and 3, SmolLM2, GPT-2, ...)
    load_tokenizer("meta_folder")   a Llama-3 tokenizer.model, as Meta publishes it
    load_tokenizer("gpt2")          an encoding that tiktoken knows by name and downloads
    load_tokenizer("world")         the pocket world's words

A tokenizer.json runs on the `tokenizers` library, so its ids are exact by definition; the others
are ranks of bytes and run on tiktoken. Training cuts a text anywhere and goes on from there, so two
things hold that the libraries alone don't promise: decode(a) + decode(b) is decode(a + b) (but for
a cut inside a character), and `encode(text, continues=True)` puts no space before the text.
Ordinary text never becomes a special token, even where it spells one.
"""

import base64
import json
import re
import secrets
import shutil
import string
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from support.command import ROOT, UserError
from support.hub import local_folder

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORLD_PATTERN = r" ?\S+|\s"  # words as they stand between spaces
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # where no file names the token
CONFIGS = (  # the first that names a token counts
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
SIBLINGS = (  # files that belong to a tokenizer.json
    *CONFIGS[:2],
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
LONG_SPACE = 900_000  # characters; tiktoken gives up at about a million in one run
LARGEST_FILE = 256 << 20  # bytes of a tokenizer's file; the largest in use have about 35 MB
LARGEST_ID = 2**24  # no model has an embedding of that many rows


class Tokenizer:
    """What both kinds have. specials: name and id of each special token; eos: the id that ends a
    document; bos: the one that the tokenizer itself puts before a text, or None; start_ids: [bos],
    or nothing; splits_words: every letter has a token, and none holds letters of two words."""

    vocab_size: int
    splits_words: bool

    def __init__(self, specials: dict[str, int], eos: str, bos: str | None):
        self.specials, self.eos_name, self.bos_name = specials, eos, bos
        self.eos, self.bos = specials[eos], specials[bos] if bos else None
        self.start_ids = [] if self.bos is None else [self.bos]

    def save(self, folder: str | Path) -> None:
        """Write what transformers, vLLM and llama.cpp read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write_vocabulary(Path(folder))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.eos_name,
            "bos_token": self.bos_name,
        }
        if not (file := Path(folder, "tokenizer_config.json")).exists():
            file.write_text(json.dumps(config, indent=2), encoding="utf-8")

    def write_vocabulary(self, folder: Path) -> None:
        raise NotImplementedError


def as_list(ids) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


# ------------------------------------------------------------------------------------------------
# Ranks, on tiktoken


class RankTokenizer(Tokenizer):
    """Byte-level BPE: `pattern` cuts a text into pieces, in which neighbours are joined, the lowest
    rank first; a rank is the token's id."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, specials: dict, eos: str, bos=None):
        super().__init__(specials, eos, bos)
        self.ranks, self.pattern = ranks, pattern
        self.vocab_size = 1 + max(*ranks.values(), *specials.values())
        self.token_bytes = [b""] * self.vocab_size  # special tokens are nothing in a text
        for token, i in ranks.items():
            self.token_bytes[i] = token
        self.splits_words = all(len(token.split()) < 2 for token in ranks)
        self.encoding = tiktoken.Encoding(
            "ordinary text", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """continues: as for FileTokenizer; here a text is cut alike wherever it stands."""
        pieces, at, half = [], 0, LONG_SPACE // 2
        if len(text) > LONG_SPACE:  # the pattern would overflow; the look-behind keeps this linear
            for run in re.finditer(rf"(?<!\s)\s{{{LONG_SPACE},}}", text):
                for end in range(run.start() + half, run.end(), half):
                    pieces.append(text[at:end])
                    at = end
        pieces.append(text[at:])
        return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def decode(self, ids) -> str:
        """Special tokens and ids outside the vocabulary are dropped."""
        data = b"".join(self.token_bytes[i] for i in as_list(ids) if i < self.vocab_size)
        return data.decode("utf-8", errors="replace")

    def write_vocabulary(self, folder: Path) -> None:
        """tokenizer.json with every merge that tiktoken would do, lowest rank first."""
        symbols = {token: to_symbols(token) for token in self.ranks}
        merges = [
            (symbols[token[:i]], symbols[token[i:]])
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
            for i in range(1, len(token))
            if self.ranks.get(token[:i], rank) < rank > self.ranks.get(token[i:], rank)
        ]
        vocab = {symbols[token]: i for token, i in self.ranks.items()}
        library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
        # tiktoken's patterns have possessive quantifiers; without them they match the same text
        pattern = re.sub(r"([+*?]|{\d+,\d+})\+", r"\1", self.pattern).replace("$", r"\z")
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        # the library counts ids up, so those without a token get one
        names = {i: name for name, i in self.specials.items()}
        for i in range(len(vocab), self.vocab_size):
            library.add_special_tokens([names.get(i, f"<|unused_{i}|>")])
        if bos := self.bos_name:
            library.post_processor = processors.TemplateProcessing(
                f"{bos} $A", f"{bos} $A {bos} $B:1", [(bos, self.bos)]
            )
        library.save(str(folder / "tokenizer.json"), pretty=False)


def to_symbols(token: bytes) -> str:
    """The printable stand-ins that a byte-level tokenizer.json writes for bytes."""
    return "".join(SYMBOLS[byte] for byte in token)


PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = sorted({*range(256)} - PRINTABLE)
SYMBOLS = [chr(b if b in PRINTABLE else 256 + OTHERS.index(b)) for b in range(256)]


def from_words(words: list[str]) -> RankTokenizer:
    """One token for each word, alone and after a space; anything else falls back to bytes."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [form.encode() for word in words for form in (word, " " + word)]
    tokens = sorted(dict.fromkeys(tokens), key=len)  # parts before the words they make
    ranks = {token: i for i, token in enumerate(tokens)}
    return RankTokenizer(ranks, WORLD_PATTERN, {"<|endoftext|>": len(ranks)}, "<|endoftext|>")


def from_llama3_model(path: Path) -> RankTokenizer:
    """Lines of base64 token and rank, as Meta publishes Llama 3."""
    ranks = {}
    for line in read_bounded(path).splitlines():
        if not re.fullmatch(rb"(?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/=]{4} \d{1,7}", line):
            raise UserError(f"{path} is no Llama-3 tokenizer.model; is there a tokenizer.json?")
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
    named |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    spare = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(spare)}" for i in range(256)]
    specials = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    return RankTokenizer(ranks, LLAMA3_PATTERN, specials, "<|end_of_text|>", "<|begin_of_text|>")


# ------------------------------------------------------------------------------------------------
# tokenizer.json, on `tokenizers`


class FileTokenizer(Tokenizer):
    """A tokenizer.json; UserError where its decoder can't give a text back in parts."""

    def __init__(self, path: Path):
        self.source, spec = path, json.loads(read_bounded(path))
        ids = tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values())
        if self.vocab_size > LARGEST_ID or len(set(ids.values())) < len(ids):
            raise UserError(f"its ids must be distinct and below {LARGEST_ID}")
        eos, bos = ends_of(spec, path.parent, ids)
        names = {token["content"] for token in spec["added_tokens"] if token["special"]}
        super().__init__({name: ids[name] for name in {*names, eos, bos} - {None}}, eos, bos)
        self.dropped = set(self.specials.values())
        spec = ordinary_only(spec, self.specials)
        self.library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        inner = {key: without_lead(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec | inner))
        self.splits_words = (
            spec["decoder"]["type"] == "ByteLevel"
            and not spec.get("normalizer")
            and set(string.ascii_letters) <= ids.keys()
            and all(len(self.decode([i]).split()) < 2 for i in range(self.vocab_size))
        )

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """continues: the text stands right behind another, so no space may be put before it."""
        if not text.isascii():  # half a surrogate pair can't be encoded
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        library = self.inner if continues else self.library
        # a batch of one, since only batches let other threads run meanwhile
        return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids) -> str:
        """Special tokens and ids outside the vocabulary are dropped."""
        kept = [i for i in as_list(ids) if i < self.vocab_size and i not in self.dropped]
        return self.library.decode(kept, skip_special_tokens=False)

    def write_vocabulary(self, folder: Path) -> None:
        """The original, untouched, and what belongs to it."""
        if self.source.parent.resolve() == folder.resolve():
            return
        shutil.copy(self.source, folder / "tokenizer.json")
        for name in SIBLINGS:
            if (self.source.parent / name).exists():
                shutil.copy(self.source.parent / name, folder / name)


def ordinary_only(spec: dict, specials: dict[str, int]) -> dict:
    """The spec for ordinary text alone: special tokens keep their ids under names that no text can
    spell, nothing is put around a text, and a part of the ids gives that part of the text."""
    secret = secrets.token_hex(8)

    def hidden(token: str) -> str:
        return secret + token if token in specials else token

    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden(token): i for token, i in model["vocab"].items()}
    else:  # a unigram model, where a special token's score beats any text that spells it
        model["vocab"] = [[hidden(token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden(model["unk_token"])
    if "merges" in model:  # "left right", or [left, right]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & specials.keys()]
    added = [token | {"content": hidden(token["content"])} for token in spec["added_tokens"]]
    decoder = piecewise(spec.get("decoder") or {})
    if model.get("byte_fallback") and "ByteFallback" not in json.dumps(decoder):
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, decoder]}
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return spec | {"model": model, "added_tokens": added, "decoder": decoder} | nothing


def piecewise(decoder: dict) -> dict:
    """The decoder, without what it does to the first or the last token alone."""
    kind = decoder.get("type")
    if kind == "Sequence":
        steps = [piecewise(step) for step in decoder["decoders"] if step["type"] != "Strip"]
        return {"type": kind, "decoders": steps}
    if kind == "Metaspace":
        back = {"pattern": {"String": decoder["replacement"]}, "content": " "}
        return {"type": "Replace", **back}
    if kind in ("ByteLevel", "ByteFallback", "Fuse", "Replace"):
        return decoder
    raise UserError(f"its decoder ({kind}) does not give a text back as it was")


def without_lead(step: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer for the middle of a text: it puts or cuts nothing at an end."""
    if step is None or step["type"] in ("Prepend", "Strip"):
        return None
    for key in {"normalizers", "pretokenizers"} & step.keys():
        step = step | {key: [inner for inner in map(without_lead, step[key]) if inner]}
    never = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {}}.get(step["type"])
    return step if never is None else step | never | {"add_prefix_space": False}


def ends_of(spec: dict, folder: Path, ids: dict[str, int]) -> tuple[str, str | None]:
    """The token that ends a text, and the one that the tokenizer puts before it. What ends a text
    is guessed from names only where no file says it."""
    eos, bos = (named(folder, role, ids) for role in ("eos_token", "bos_token"))
    eos = eos or next((name for name in END_OF_TEXT if name in ids), None)
    if eos is None:
        raise UserError("nothing says what ends a text: name eos_token in tokenizer_config.json")
    step = spec.get("post_processor") or {}
    firsts = [(inner.get("single") or [{}])[0] for inner in step.get("processors", [step])]
    put = [first["SpecialToken"]["id"] for first in firsts if "SpecialToken" in first]
    bos = bos or next(iter(put), None)
    asked = read_config(folder / "tokenizer_config.json").get("add_bos_token")
    return eos, bos if (bos in put if asked is None else asked) else None


def named(folder: Path, role: str, ids: dict[str, int]) -> str | None:
    """The token that the folder's files name, or number, as their eos_token or bos_token."""
    names = {i: token for token, i in ids.items()}
    for file in CONFIGS:
        found = read_config(folder / file)
        token = found.get(role) if role in found else names.get(first(found.get(f"{role}_id")))
        token = first(token)
        if token is not None and token not in ids:
            raise UserError(f"{folder / file}: its {role}, {token!r:.80}, is no token")
        if token is not None:
            return token
    return None


def first(value):
    """What stands for a token or an id may be a list of them, or an object that describes one."""
    value = value[0] if isinstance(value, list) and value else value
    return value.get("content") if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------
# Files


def read_bounded(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE >> 20} MiB")
    return path.read_bytes()


def read_config(path: Path) -> dict:
    return json.loads(read_bounded(path)) if path.exists() else {}


def load_tokenizer(name: str) -> RankTokenizer | FileTokenizer:
    """name: "world", a folder (or its hf:// or https URL), a tokenizer.json or .model, or an
    encoding of tiktoken's. UserError where there is no such thing, or none that can be used."""
    if name == "world":
        return from_words((ROOT / "world" / "words.txt").read_text(encoding="utf-8").split())
    path = local_folder(name, weights=False).expanduser()
    if path.is_dir():
        files = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((file for file in files if file.exists()), files[0])
    if path.suffix == ".model":
        return from_llama3_model(path)
    if path.suffix == ".json":
        try:
            return FileTokenizer(path)
        except BaseException as error:  # the library raises bare ones, and panics
            if isinstance(error, KeyboardInterrupt):
                raise
            why = error if isinstance(error, ValueError | OSError) else repr(error)
            raise UserError(f"{path} is no tokenizer.json to use: {why!s:.300}") from error
    if name in tiktoken.list_encoding_names():
        known = tiktoken.get_encoding(name)
        ranks, specials = known._mergeable_ranks, known._special_tokens
        return RankTokenizer(ranks, known._pat_str, specials, "<|endoftext|>")
    raise UserError(
        f"there is no folder {name}, and no tokenizer of that name: give a folder with "
        f"tokenizer.json or tokenizer.model, 'world', "
        f"or one of {', '.join(tiktoken.list_encoding_names())}"
    )
