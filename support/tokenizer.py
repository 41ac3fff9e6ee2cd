"""Text to token ids and back: Hugging Face's tokenizer.json, on the `tokenizers` library.

    load_tokenizer("hf_folder")     its tokenizer.json (Llama 2 and 3, SmolLM2, GPT-2, ...)
    load_tokenizer("world")         the pocket world's words

The ids are the library's, exact by definition. Training cuts a text anywhere and goes on from
there, so two things hold that the library alone doesn't promise: decode(a) + decode(b) is
decode(a + b) (but for a cut inside a character), and `encode(text, continues=True)` puts no space
before the text. Ordinary text never becomes a special token, even where it spells one.
"""

import json
import secrets
import shutil
import string
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from support.command import ROOT, UserError
from support.hub import local_folder, read_object

WORLD_PATTERN = r" ?\S+|\s"  # words as they stand between spaces
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # where no file names the token
CONFIGS = ["tokenizer_config.json", "special_tokens_map.json"]  # the first that names it counts
CONFIGS += ["config.json", "generation_config.json"]
SIBLINGS = [*CONFIGS[:2], "tokenizer.model", "chat_template.jinja"]  # they are saved beside it
LARGEST_ID = 2**24  # no model has an embedding of that many rows


class Tokenizer:
    """Made of what a tokenizer.json says and where it stands, if it does.

    specials: name and id of each special token; hidden: what `encode` reads as it instead of its
    name; eos: the id that ends a document; bos: the one that the tokenizer itself puts before a
    text, or None; start_ids: [bos], or nothing; splits_words: every letter has a token, and none
    holds letters of two words. UserError where its decoder can't give a text back in parts.
    """

    def __init__(self, spec: dict, source: Path | None = None):
        self.source = source
        self.text = "" if source else json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
        ids = tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values())
        if self.vocab_size > LARGEST_ID or len(set(ids.values())) < len(ids):
            raise UserError(f"its ids must be distinct and below {LARGEST_ID}")
        self.eos_name, self.bos_name = ends_of(spec, source and source.parent, ids)
        names = {token["content"] for token in spec["added_tokens"] if token["special"]}
        names = {*names, self.eos_name, self.bos_name} - {None}
        self.specials = {name: ids[name] for name in names}
        self.eos, self.bos = ids[self.eos_name], self.specials.get(self.bos_name)
        self.start_ids = [] if self.bos is None else [self.bos]
        self.dropped, secret = set(self.specials.values()), secrets.token_hex(8)
        self.hidden = {name: secret + name for name in names}
        spec = ordinary_only(spec, self.hidden, self.specials)
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
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        kept = [i for i in ids if i < self.vocab_size and i not in self.dropped]
        return self.library.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write what transformers, vLLM and llama.cpp read: the original, untouched, and what
        belongs to it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.source is None:
            (folder / "tokenizer.json").write_text(self.text, encoding="utf-8")
        elif self.source.parent.resolve() != folder.resolve():
            shutil.copy(self.source, folder / "tokenizer.json")
            for file in map(self.source.with_name, SIBLINGS):
                if file.exists():
                    shutil.copy(file, folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.eos_name,
            "bos_token": self.bos_name,
        }
        if not (file := folder / "tokenizer_config.json").exists():
            file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def ordinary_only(spec: dict, hidden: dict[str, str], ids: dict[str, int]) -> dict:
    """The spec for ordinary text alone: special tokens keep their ids under names that no text can
    spell, nothing is put around a text, and a part of the ids gives that part of the text."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
    else:  # a unigram model, where a special token's score beats any text that spells it
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # "left right", or [left, right]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & hidden.keys()]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    named: dict = {n: plain | dict(id=i, content=n, special=True) for n, i in ids.items()}
    named |= {token["content"]: token for token in spec["added_tokens"]}
    in_order = sorted(named.values(), key=lambda token: token["id"])  # which gives the ids
    added = [t | {"content": hidden.get(t["content"], t["content"])} for t in in_order]
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


def ends_of(spec: dict, folder: Path | None, ids: dict[str, int]) -> tuple[str, str | None]:
    """The token that ends a text, and the one that the tokenizer puts before it. What ends a text
    is guessed from names only where no file says it."""
    files = [folder / name for name in CONFIGS] if folder else []
    says = {file: read_object(file) for file in files if file.exists()}
    eos, bos = (named(says, role, ids) for role in ("eos_token", "bos_token"))
    eos = eos or next((name for name in END_OF_TEXT if name in ids), None)
    if eos is None:
        raise UserError("nothing says what ends a text: name eos_token in tokenizer_config.json")
    step = spec.get("post_processor") or {}
    firsts = [(inner.get("single") or [{}])[0] for inner in step.get("processors", [step])]
    put = [first["SpecialToken"]["id"] for first in firsts if "SpecialToken" in first]
    bos = bos or next(iter(put), None)
    asked = says.get(files[0], {}).get("add_bos_token") if files else None
    return eos, bos if (bos in put if asked is None else asked) else None


def named(says: dict[Path, dict], role: str, ids: dict[str, int]) -> str | None:
    """The token that the folder's files name, or number, as their eos_token or bos_token: it, a
    list of such, or an object that describes it."""
    names = {i: token for token, i in ids.items()}
    for file, found in says.items():
        token = found.get(role, found.get(f"{role}_id"))
        token = token[0] if isinstance(token, list) and token else token
        token = token.get("content") if isinstance(token, dict) else token
        token = names.get(token) if isinstance(token, int) else token
        if token is not None and token not in ids:
            raise UserError(f"{file}: its {role}, {token!r:.80}, is no token")
        if token is not None:
            return token
    return None


# ---- Where they come from -----------------------------------------------------------------------


def load_tokenizer(name: str) -> Tokenizer:
    """name: "world", a folder (or its hf:// address) or a tokenizer.json. UserError where there is
    no such thing, or none that can be used."""
    if name == "world":
        return from_words((ROOT / "world" / "words.txt").read_text(encoding="utf-8").split())
    path = local_folder(name, weights=False)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"there is no tokenizer {path}: give 'world' or a folder with tokenizer.json (where it "
            "has only tokenizer.model, that of the same model on Hugging Face)"
        )
    try:
        return Tokenizer(read_object(path), path)
    except BaseException as error:  # the library raises bare ones, and panics
        if isinstance(error, KeyboardInterrupt):
            raise
        why = error if isinstance(error, ValueError | OSError) else repr(error)
        raise UserError(f"{path} is no tokenizer.json to use: {why!s:.300}") from error


def from_words(words: list[str]) -> Tokenizer:
    """One token for each word, alone and after a space; anything else falls back to bytes."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [form.encode() for word in words for form in (word, " " + word)]
    # parts before the words they make
    return Tokenizer(byte_level(sorted(dict.fromkeys(tokens), key=len), ["<|endoftext|>"]))


def byte_level(tokens: list[bytes], specials: list[str]) -> dict:
    """The tokenizer.json in which each word's bytes are joined to tokens, the first named first."""
    ranks = {token: i for i, token in enumerate(tokens)}
    # a byte that is no visible character has a stand-in from 256 on
    hidden = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
    shown = [chr(256 + hidden.index(b) if b in hidden else b) for b in range(256)]
    symbols = {token: "".join(shown[byte] for byte in token) for token in tokens}
    merges = [
        (symbols[token[:i]], symbols[token[i:]])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if ranks.get(token[:i], rank) < rank > ranks.get(token[i:], rank)
    ]
    vocab = {symbols[token]: i for token, i in ranks.items()}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(WORLD_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(specials)
    return json.loads(library.to_str())
