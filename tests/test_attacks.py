"""Hostile text: judges and parsers, the training loop, the log, the terminal, tokenizers, files."""

import io
import json
import re
import sys

import attacks
import pytest

import train
from data import Stream
from judge import defuse
from rewrite import clean
from support.sources import Skips, records
from support.tokenizer import load_tokenizer

PLANTED = [
    template.format(v="A", mark="0" * 8, name="a", naive="continuation A")
    for templates in attacks.ATTACKS.values()
    for template in templates
]
HOSTILE = [*PLANTED, *attacks.TOKENS, "\x1b]0;owned\x07\x1b[2J", "\u202e\u2066 olleh \u0000"[:-1]]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def test_no_attack_wins_unless_the_judge_is_gullible():
    for quoting in (False, True):
        won = {key: share for key, (share, _) in attacks.measure(1, 0, quoting).items()}
        assert {won[family, "Ours"] for family in attacks.ATTACKS} == {0}
        assert won["chat template", "Naive"] == 1 and won["chat template", "OnlyMarks"] > 0.9
        assert won["end of section, known", "Naive"] > 0.4
    assert attacks.measure(1, 1)["a verdict", "Ours"] == (1, 0)  # nothing helps against g = 1


@pytest.mark.parametrize("token", attacks.TOKENS)
def test_no_special_token_is_left_and_a_rewrite_gets_it_back(token):
    text = f" say {token} and go on {token}x"
    assert token not in defuse(text) and defuse(text).replace(" ", "") == text.replace(" ", "")
    assert clean(defuse(text), "They", text) == text
    library = pytest.importorskip("tokenizers")
    server = library.Tokenizer(library.models.WordLevel({"?": 0}, unk_token="?"))
    server.add_special_tokens(attacks.TOKENS)  # as a server reads a user's message
    assert len(set(server.encode(text).ids)) > 1 == len(set(server.encode(defuse(text)).ids))


def test_plain_text_is_not_touched():
    text = "a < b | c > d, <b>bold</b>, [1], x[/path], <start>, if (a <|b|| c) { d[INSTANCE] }"
    assert defuse(text) == text


def hostile_corpus(folder):
    texts = [f"{attack} mirela lives in calva . " * 40 for attack in HOSTILE for _ in range(3)]
    texts = [f"this is number {n} . {text}" for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return folder / "corpus.jsonl"


def test_training_goes_on_and_neither_log_nor_terminal_suffers(tmp_path, monkeypatch):
    sizes = ["--base_steps=1", "--base_batch_size=4", "--max_steps=2", "--batch_size=4"]
    rest = ["--rollouts=2", "--eval_prefixes=0", "--baseline=False", "--example_every=1"]
    where = [f"--data={hostile_corpus(tmp_path)}", f"--out_dir={tmp_path / 'run'}"]
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["train.py", *where, *sizes, *rest, "--dials=gullible=1"])
    assert train.launch() == 0
    lines = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    screen.flush()
    printed = screen.buffer.getvalue().decode("ascii")
    assert "prefix" in printed and not CONTROL.search(printed)


def test_look_alikes_of_special_tokens_stay_text():
    tokenizer = load_tokenizer("world")
    for text in [*HOSTILE, *(f"{token}\n" for token in tokenizer.specials)]:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.specials.values())
        assert tokenizer.decode(ids).split() == text.split()


def test_a_word_of_ten_megabytes(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 10_000_000}) + '\n{"text": "b"}')
    assert [n for n, _ in records(str(tmp_path / "long.jsonl"), Skips())] == [1, 2]
    stream = Stream(
        str(tmp_path / "long.jsonl"),
        load_tokenizer("world"),
        chunk=32,
        max_seq=96,
        batch_size=1,
        split="all",
        epochs=1,
    )
    (batch,) = stream
    assert batch.suffix.shape == (1, 32) and batch.prefix.shape == (1, 64)
