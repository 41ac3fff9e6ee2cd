"""The trial on real text: what its judge learns from, the rule by which it ends, its measures."""

import argparse
import contextlib
import json
from collections import Counter

import pytest
from convert_brown import plain

from data import digest, in_split
from model import Llama, preset, save_model
from study import real_text
from support.command import UserError
from support.tokenizer import load_tokenizer
from world import corpus

TEXTS = [corpus.document(0, number) for number in range(300)]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("real"), load_tokenizer("world")
    save_model(Llama(preset("world", tokenizer.vocab_size)).initialise(0), folder, None, 1)
    tokenizer.save(folder)
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "text.jsonl").write_text("".join(lines))
    paths = dict(out=folder / "out", settings=real_text.ROOT / "configs" / "real_text.py")
    return argparse.Namespace(text=str(folder / "text.jsonl"), start=str(folder), seed=0, **paths)


def test_pairs_show_an_original_and_a_worse_one_of_every_kind_in_drawn_order(args):
    size = dict(chunk=16, max_seq=48)
    rows = list(real_text.pairs(args, size, "teacher"))
    assert rows == list(real_text.pairs(args, size, "teacher"))
    assert Counter(row["damage"] for row in rows).keys() == real_text.KINDS.keys()
    assert min(Counter(row["label"] for row in rows).values()) > 0.3 * len(rows)
    whole = {text: in_split(digest(text), "teacher") for text in TEXTS}
    for row in rows:
        original, worse = (row["a"], row["b"])[:: 1 if row["label"] == "A" else -1]
        assert any(f"{row['prefix'].strip()} {original}" in t and mine for t, mine in whole.items())
        assert row["answer"] == row["label"] and worse != original == original.strip()
        if row["damage"] in ("shuffled", "halves swapped"):
            assert sorted(worse.split()) == sorted(original.split())
        if row["damage"] == "looped":
            assert set(worse.split()) == set(original.split()[:4])
    validation = Counter(row["damage"] for row in real_text.pairs(args, size, "validation"))
    assert max(validation.values()) - min(validation.values()) <= 2  # a sample gives one of each


@pytest.mark.parametrize("right, stages", [(0.4, ["judge"]), (0.6, ["judge", "policy"])])
def test_a_judge_that_is_not_good_enough_ends_the_trial(args, monkeypatch, right, stages):
    done, rows = [], [{"damage": kind} for kind in real_text.KINDS for _ in range(2)]

    def stage(made, *words, **flags):
        done.append(made.parent.name)
        if len(done) == 2:
            raise UserError("far enough")
        answers = {"quality": {"reward": [1.0, right] * len(real_text.KINDS)}}
        return {"values": {"method": answers}, "rows": rows}

    monkeypatch.setattr(real_text, "stage", stage)
    monkeypatch.setattr(real_text, "start_server", contextlib.nullcontext)
    with pytest.raises(UserError) if len(stages) == 2 else contextlib.nullcontext():
        report = real_text.experiment(args)
        assert "| mean | 10 | 70.0 |" in report and "the trial ends" in report
    assert done == stages


def test_measures_tell_loops_from_prose():
    prose, loop = "one two three four five six", "one two one two one two"
    assert real_text.distinct([prose], 2) == 1.0 and real_text.distinct([loop], 2) == 2 / 5
    assert real_text.distinct([prose, prose], 2) == 0.5


def test_brown_becomes_prose():
    tagged = (
        "Plans/nns-hl made/vbd-hl\nHe/pps said/vbd ,/, ``/`` no/uh ''/'' (/( twice/rb )/) ./. ./."
    )
    assert plain(tagged) == 'He said, "no" (twice).'
