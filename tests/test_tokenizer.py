"""support/tokenizer.py: the library's ids; parts that join; text stays text.

Nothing is downloaded: the vocabularies are trained here, each with its style's parts.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from hostile import places, spoilt, values
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import AutoTokenizer

from support import tokenizer as tk
from support.command import UserError
from teachers.template import Template
from world.corpus import vocabulary

HARD = [
    "",
    " ",
    "\n",
    "Hello, world! It's the 21st; they've gone, we'll see, I'M HERE'S",
    "  leading, tabs\t\tand\n\n\nnewlines\r\n \r\n  and   spaces    before 1234567 3.14e-10  42  ",
    "   1  22 \t 333\n4444 ⅷ ½ ٣٤٥ ²³ 一二",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # comment\n\n\n",
    "naïve café ĀāĂ ﬁne 𝕳𝖊𝖑𝖑𝖔 Ω≈ç√∫ ẞß İi̇ e\u0301",
    "日本語のテキスト 中文测试 한국어 ไทย हिन्दी العربية 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ©®™ 🫠",
    "\u00a0nbsp\u2003em\u3000wide\u200bzero\ufeffbom\u2028line\x85nel\x1c\x1d\x1e\x1f",
    "".join(map(chr, range(0x180))),
    "\x04\x06!\x13! \x14?\U00040000a \U000b748c'",
    "<|endoftext|><|im_start|>user <|begin_of_text|> </s> <|eot_id|>x<|endoftext|",
    "x" * 3000 + " " * 3000 + "y" + "\n" * 500 + "a" * 28 + "!" * 18 + " ------- ==========",
    "https://example.org/a_b?c=1&d=%20#e user@example.org C:\\temp\\n ''''s 're",
    "\U0010ffff\ue000\ufffd\ufffe",
]
PROSE = ["the home of yavina is isgard . she works as a sailor and keeps a dog . 1,234 items\n"] * 3
PROSE += ["héllo wörld 日本語 🙂 tabs\tand  two spaces\n\nnew paragraph , said Ann's town"] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRINTED = [chr(i) for i in range(33, 127)]  # SmolLM2 lacks bytes that its texts had none of


def random_strings(count: int, seed: int) -> list[str]:
    rng, text = random.Random(seed), Path(json.__file__).read_text() + "".join(HARD)
    planes = ["  \t\n\r '", "azAZ09'.!_-é字", [chr(i) for i in range(0x2100)]]
    planes.append([chr(i) for i in range(0x10FFFF) if not 0xD800 <= i < 0xE000])
    strings = []
    for _ in range(count):
        start = rng.randrange(len(text) - 80)
        mixed = [rng.choice(rng.choice(planes)) for _ in range(rng.randint(0, 20))]
        strings.append(text[start : start + rng.randint(1, 60)] + "".join(mixed))
    return strings


# ---- Kinds of tokenizer.json ---------------------------------------------------------------------

BYTES = [f"<0x{i:02X}>" for i in range(256)]
BACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPING = decoders.Sequence([*BACK, decoders.Strip(" ", 1, 0)])


def complete(library: Library, decoder, **parts) -> Library:
    library.decoder = decoder
    library.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    for name, part in parts.items():
        setattr(library, name, part)
    return library


def pieces(decoder, ignore_merges=False, **parts) -> Library:
    """sentencepiece's BPE: spaces are ▁, what has no token is bytes."""
    library = Library(models.BPE(unk_token="<unk>"))
    for name, part in parts.items():
        setattr(library, name, part)
    trainer = BpeTrainer(vocab_size=500, special_tokens=SPECIALS + BYTES, show_progress=False)
    library.train_from_iterator(PROSE, trainer)
    model = json.loads(library.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    how = dict(unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=ignore_merges)
    return complete(Library(models.BPE(model["vocab"], merges, **how)), decoder, **parts)


def unigram(decoder) -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    how = dict(special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(PROSE, UnigramTrainer(vocab_size=160, **how))
    vocab = [tuple(row) for row in json.loads(library.to_str())["model"]["vocab"]]
    model = models.Unigram(vocab + [(byte, -20.0) for byte in BYTES], 0, True)
    return complete(Library(model), decoder, pre_tokenizer=pre_tokenizers.Metaspace())


def byte_level(*first, regex=True, prefix=False, added=(), alphabet=None, **parts) -> Library:
    library = Library(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    library.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    how = dict(special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([*PROSE, *HARD[:10] * 2], BpeTrainer(vocab_size=900, **how))
    library.add_tokens(list(added))
    return complete(library, decoders.ByteLevel(), **parts)


def metaspace(scheme: str, split: bool, decoder=STRIPPING, **how) -> Library:
    return pieces(decoder, pre_tokenizer=pre_tokenizers.Metaspace("▁", scheme, split=split), **how)


LLAMA3 = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
STARTED = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
KINDS = {
    "gpt2": byte_level,
    "smollm2": lambda: byte_level(pre_tokenizers.Digits(True), alphabet=PRINTED),
    "llama3": lambda: byte_level(LLAMA3, regex=False, post_processor=STARTED),
    "prefix space": lambda: byte_level(prefix=True),
    "nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "added words": lambda: byte_level(added=[AddedToken("    ", normalized=False), "isgard"]),
    "llama2": lambda: pieces(STRIPPING, normalizer=LLAMA2, post_processor=STARTED),
    "gemma": lambda: pieces(decoders.Sequence(BACK), normalizer=normalizers.Replace(" ", "▁")),
    "metaspace first": lambda: metaspace("first", False),
    "metaspace always": lambda: metaspace("always", True),
    "metaspace never": lambda: metaspace("never", False, decoders.Sequence(BACK)),
    "metaspace decoder": lambda: metaspace("always", True, decoders.Metaspace()),
    "whole pieces": lambda: metaspace("never", True, decoders.Sequence(BACK), ignore_merges=True),
    "unigram": lambda: unigram(decoders.Metaspace()),
    "unigram, bytes": lambda: unigram(decoders.Sequence([BACK[1], decoders.Metaspace()])),
}
LEADING = {"prefix space", "llama2", "metaspace first", "metaspace always", "metaspace decoder"}
LEADING |= {"unigram", "unigram, bytes"}  # these put a space before a text


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(name, folder, the library's tokenizer, ours)"""
    folder = tmp_path_factory.mktemp("kind")
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    return request.param, folder, library, tk.load_tokenizer(str(folder))


def test_ids_are_those_of_the_library(kind):
    """And, where no token spans two words, there are no fewer than words."""
    name, _, library, ours = kind
    words = {"gpt2", "smollm2", "llama3", "prefix space", "added words"}
    assert ours.splits_words == (name in words)
    for text in HARD + random_strings(500, seed=1):
        ids = ours.encode(text)
        if not any(special in text for special in SPECIALS):
            assert ids == library.encode(text, add_special_tokens=False).ids, repr(text)
        assert not ours.splits_words or len(re.findall(r"(?<!\S)[A-Za-z]\S*", text)) <= len(ids)


def test_parts_join(kind):
    """At every cut that is not within a character's bytes."""
    name, _, _, ours = kind
    for text in [*HARD, *PROSE[2:4], "  two", " one", *random_strings(60, seed=2)]:
        for continues in (False, True):
            ids = ours.encode(text[:300], continues)
            whole = ours.decode(ids)
            parts = {(ours.decode(ids[:cut]), ours.decode(ids[cut:])) for cut in range(len(ids))}
            assert {a + b for a, b in parts if "\ufffd" not in a + b} <= {whole}


def test_texts_come_back(kind):
    """A continuation to the letter; a document perhaps with one more space before it."""
    name, _, _, ours = kind
    same = (lambda t: t.replace("e\u0301", "é")) if name == "nfc" else lambda t: t
    for text in [*PROSE[2:4], "gard . she", " she works", "  two  spaces", " ", *HARD[3:11]]:
        if name == "smollm2":  # bytes that it has no token for are dropped
            text = "".join(c for c in text if ours.decode(ours.encode(c)) == c)
        assert ours.decode(ours.encode(text, continues=True)) == same(text)
        again = ours.decode(ours.encode(text))
        assert again == same(text) or (name in LEADING and again == " " + same(text))
    assert ours.decode(ours.encode("\ud800a", True)) in ("\ufffda", "a")  # half a surrogate pair
    joined = ours.encode("she works") + ours.encode(" as a", True) + ours.encode("ble", True)
    assert ours.decode(joined).lstrip() == "she works as able"


def test_a_spelled_special_token_stays_text(kind):
    _, _, library, ours = kind
    for text in ["<s>", "</s>", "<unk>", "a <s> b</s>", "<s><s>", "</s", " </s>"]:
        for continues in (False, True):
            ids = ours.encode(text, continues)
            assert not set(ids) & {library.token_to_id(name) for name in ("<s>", "</s>")}
            if ours.decode([*ids, ours.eos]).lstrip() != text.lstrip():
                assert library.get_vocab_size() < 500  # letters may be lacking, then
                assert set(ids) & {library.token_to_id("<unk>")}
    ids = [ours.eos, *ours.encode("a b"), ours.eos, ours.vocab_size + 5]
    assert ours.decode(ids) in ("a b", " a b")


def test_saved_folder_is_what_transformers_reads(kind, tmp_path):
    name, folder, library, ours = kind
    assert ours.eos == library.token_to_id("</s>") and ours.vocab_size > ours.eos
    started = name in ("llama2", "llama3")
    assert ours.start_ids == ([ours.bos] if started else []) == library.encode("x").ids[:started]
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos
    ids = theirs.encode(PROSE[3], add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(PROSE[3]) == ids


# ---- What ends and begins a text -----------------------------------------------------------------

A, B, C, PUT = "<|a|>", "<|b|>", "</s>", "<|b|> $A"
OBJECT, BOS = {"content": B, "special": True}, {"bos_token": B}
SAYS = [  # tokenizer_config, special_tokens_map, config, generation_config: the token that ends
    ([{"eos_token": A}, None, {"eos_token_id": 2}], A),
    ([{"eos_token": OBJECT}], B),
    ([{"eos_token": None}, {"eos_token": OBJECT}], B),
    ([None, {"eos_token": [B, A]}], B),
    ([None, {"eos_token": A}, None, {}], A),
    ([None, None, {"eos_token_id": 1}, {"eos_token_id": 2}], B),
    ([None, None, {"eos_token_id": [2, 1]}], C),
    ([None, None, {"eos_token_id": None}, {"eos_token_id": [0]}], A),
    ([None, None, {"eos_token_id": 99}], C),
    ([], C),
]
STARTS = [  # what the tokenizer puts around a text, tokenizer_config: the token that begins
    (None, BOS, None),
    (PUT, BOS, B),
    (PUT, {}, B),  # nobody names it
    ("$A </s>", {"bos_token": C}, None),
    (None, BOS | {"add_bos_token": True}, B),
    (PUT, BOS | {"add_bos_token": False}, None),
    (PUT, BOS | {"add_bos_token": None}, B),
]


def small(folder: Path, files=(), template: str | None = None) -> tk.Tokenizer:
    library = Library(models.WordLevel({A: 0, B: 1, C: 2, "a": 3}, "a"))
    library.add_special_tokens([A, B, C])
    library.decoder = decoders.Fuse()
    if template:
        library.post_processor = processors.TemplateProcessing(template, None, [(B, 1), (C, 2)])
    library.save(str(folder / "tokenizer.json"))
    for name, content in zip(tk.CONFIGS, files, strict=False):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return tk.load_tokenizer(str(folder))


@pytest.mark.parametrize("files, ends", SAYS)
def test_what_ends_a_text_is_what_the_files_say(tmp_path, files, ends):
    assert small(tmp_path, files).eos_name == ends


@pytest.mark.parametrize("template, config, starts", STARTS)
def test_what_begins_a_text(tmp_path, template, config, starts):
    assert small(tmp_path, [config], template).bos_name == starts


# ---- Words ---------------------------------------------------------------------------------------

WORDS = ["the", "town", "of", "is", "in", ".", ",", "Ann's", "isgard", "i", "s", "to", "wn", "ten"]


def test_words_are_single_tokens_and_the_rest_is_bytes(tmp_path):
    ours = tk.from_words(WORDS)
    assert all(len(ours.encode(form + w)) == 1 for w in WORDS for form in ("", " "))
    assert len(ours.encode("the town of Ann's is in isgard .")) == 8
    assert ours.eos == ours.vocab_size - 1 and ours.start_ids == []
    file, world = "tokenizer.json", tk.load_tokenizer("world")
    world.save(tmp_path / "a")
    tk.from_words(vocabulary()).save(tmp_path / "b")
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    ours.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), tk.load_tokenizer(str(tmp_path))
    assert again.eos == ours.eos == theirs.eos_token_id and again.splits_words
    rng = random.Random(0)
    jumbled = ["".join(rng.choices([*WORDS, " ", "x", "t", "\n"], k=12)) for _ in range(2000)]
    for text in HARD + jumbled:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == again.encode(text) == ids
        assert ours.decode(ids) == again.decode(ids) == text
    assert ours.decode(ours.encode("é")[:1]) == again.decode(ours.encode("é")[:1]) == "\ufffd"


# ---- What can't be used --------------------------------------------------------------------------


def test_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"

    def refused(match: str, text: str | None = None, name=str(tmp_path)):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=match):
            tk.load_tokenizer(name)

    refused("no tokenizer", name="gpt3")
    refused("no tokenizer.json to use", "{")
    library = Library(models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    refused("decoder", library.to_str())
    library.decoder = decoders.WordPiece()
    refused("WordPiece", library.to_str())
    small(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot|>"}')
    refused(r"special_tokens_map.json: its eos_token, '<\|eot\|>'")
    path.rename(tmp_path / "tokenizer.model")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    refused(f"no tokenizer {path}: .*has only", name=f"~/{tmp_path.name}")


def test_any_tokenizer_json_is_taken_or_refused_in_one_line(tmp_path):
    """Absurd ids among the rest, for which no table may be made."""
    tk.from_words(["one", "two"]).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = json.loads(file.read_text())

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(list(places(whole))), values)
    def check(place, new):
        file.write_text(json.dumps(spoilt(whole, place, new)))
        try:
            loaded = tk.load_tokenizer(str(tmp_path))
        except UserError as error:
            assert str(file) in str(error) and len(str(error)) < 600
        else:
            assert loaded.vocab_size <= 2**24

    check()
    for number in (2**40, 2**31, -1, 1.5, 1):
        file.write_text(json.dumps(spoilt(whole, ("model", "vocab", "a"), number)))
        with pytest.raises(UserError, match="no tokenizer.json to use"):
            tk.load_tokenizer(str(tmp_path))


def test_a_chat_prompt_is_that_of_transformers(kind, tmp_path):
    _, folder, _, ours = kind
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("<s>[{{ messages[0].content }}] {{ 1 }}</s> x")
    said = [{"role": "user", "content": "she said"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(said, return_dict=False)
    assert Template(tmp_path, ours).encode(said) == theirs
