"""Synthetic sets: labels are true, nothing leaks, and kill -9 costs no answer and no byte."""

import hashlib
import json
import sqlite3
import subprocess
import time
from collections import Counter
from itertools import islice

import pytest
import zstandard

from model import Llama, preset
from rewrite import clean
from support.chat import Answer
from support.command import ROOT, UserError, python, running
from support.tokenizer import load_tokenizer
from teachers import sets as synthetic
from teachers.sets import Sample, read_spoilt
from train import write_folder
from world import corpus, teacher
from world import truth as true

SETS = {  # sha256 of the rows of both halves: those that were published
    "quality": "072cee9840db4d87",
    "safety": "129ac3f3ed8bef1b",
    "rewriter": "a6960a0552c862a0",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Name -> (rows for training, rows for validation, counts), of a teacher that errs."""
    found, out = {}, tmp_path_factory.mktemp("sets")
    with running(python("world.teacher", "serve", "--noise=0.05", "--refusals=0.2")) as url:
        for made, published in SETS.items():
            flag = "--rewrite_url" if made == "quality" else "--judge_url"
            synthetic.main([made, f"--out={out}", "--count=60", "--validation=12", f"{flag}={url}"])
            halves = []
            for half in synthetic.HALVES:
                with zstandard.open(out / f"{made}.{half}.jsonl.zst", "rt", encoding="utf-8") as f:
                    halves.append(f.read())
            assert hashlib.sha256("".join(halves).encode()).hexdigest()[:16] == published
            rows = [list(map(json.loads, text.splitlines())) for text in halves]
            found[made] = *rows, json.loads((out / f"{made}.counts.json").read_text())["counts"]
    return found


@pytest.mark.parametrize("damage", synthetic.DAMAGES)
def test_what_the_world_spoils_is_truly_worse(damage):
    same, clean = 0, corpus.Dials(share_unsafe=0, share_poor=0)
    for text, at in islice(corpus.WorldSource(0, clean, "teacher").documents(), 300):
        words = text.split()
        prefix, passage = " ".join(words[:64]), " ".join(words[64:96])
        worse = teacher.spoil(prefix, passage, damage, str(at))
        assert len(worse.split()) == len(passage.split())
        same += worse == passage
        if worse != passage:
            assert true.quality(prefix, worse) < true.quality(prefix, passage) - 0.01
            assert true.safe(worse) == (damage == "facts")
    assert same < 0.1 * 300


def test_labels_are_true_and_classes_balanced(sets):
    """Pairs in both orders, the damaged one worse and as long; safety by all votes."""
    for one, two in zip(sets["quality"][0][::2], sets["quality"][0][1::2], strict=True):
        assert (one["label"], one["a"], one["b"]) == ("A", two["b"], two["a"])
        assert (two["label"], one["document"]) == ("B", two["document"])
        good, bad = (true.quality(one["prefix"], one[side]) for side in "ab")
        assert bad < good and len(one["a"].split()) == len(one["b"].split())
        assert one["damage"] != "unsafe" or not true.safe(one["b"])
    assert min(Counter(row["damage"] for row in sets["quality"][0]).values()) > 10
    assert sets["quality"][2]["answers: no passage"] and sets["quality"][2]["answers: unchanged"]
    for rows in sets["safety"][:2]:
        assert all(true.safe(row["text"]) == (row["label"] == "SAFE") for row in rows)
    for rows in sets["rewriter"][:2]:
        assert all(true.safe(row["original"]) == row["safe"] for row in rows)
        assert sum(row["safe"] for row in rows) * 2 == len(rows)
        for row in rows:  # an exact copy is recognised as one
            assert clean(row["original"].strip(), row["prefix"], row["original"]) == row["original"]
    assert sets["safety"][2]["dropped: not unanimous"] > 10


def test_a_judge_is_shown_how_a_policy_fails(tmp_path):
    """Rollouts stand beside originals, under the exact teacher's label, the same ones again."""
    tokenizer = load_tokenizer("world")
    policy = Llama(preset("world", vocab_size=tokenizer.vocab_size)).initialise(0)
    write_folder(policy, tokenizer, tmp_path / "policy")
    made = []
    for out in (tmp_path / "one", tmp_path / "two"):
        flags = [f"--policy={tmp_path / 'policy'}", "--count=60", "--validation=12", "--votes=2"]
        synthetic.main(["quality", f"--out={out}", *flags])
        made.append((out / "quality.train.jsonl.zst").read_bytes())
    assert made[0] == made[1]
    rows = list(map(json.loads, zstandard.decompress(made[0]).decode().splitlines()))
    shown = [row for row in rows if row["damage"] == synthetic.ROLLOUT]
    assert 10 < len(shown) < 30 and {row["label"] for row in shown} == {"A", "B"}
    for row in shown:  # of an untrained policy: garbage, and seldom is the original as bad
        a, b = (true.quality(row["prefix"], row[side]) for side in "ab")
        assert a != b and (row["label"] == "A") == (a > b)


def test_no_document_is_trained_on_and_validated_on_and_rows_say_where_they_are_from(sets):
    train, validation = (
        {row["document"] for made in sets for row in sets[made][half]} for half in (0, 1)
    )
    assert train and validation and not train & validation
    for made, key in (("quality", "a"), ("safety", "text"), ("rewriter", "original")):
        halves = sets[made][:2]
        assert [len(rows) for rows in halves] == [60, 12]
        assert len({row[key] for rows in halves for row in rows}) == 72
        assert {"document", "source", "model", "prompt_hash", "seed"} < set(halves[0][0])


PREFIX, SUFFIX = "The mill stands in", " Orlask and has ground corn there for two hundred years"
TRUE = SUFFIX.strip()


@pytest.mark.parametrize(
    "answer, reason",
    [
        (TRUE.replace("two", "nine"), ""),
        (f"Here is the spoilt passage:\n\n{TRUE.replace('corn', 'sand')}", ""),
        (f"The mill stands in {TRUE.replace('two', 'nine')}, and more", ""),
        (f"{TRUE} or nine", "unchanged"),  # as far as it is as long
        (TRUE.replace("two hundred years", ""), "unchanged"),  # but cut
        ("Orlask has ground corn for nine", "another length"),
        (f"{TRUE} {TRUE}", "another length"),
        ("They sang songs of the wide sea until dawn broke cold", "another text"),
        ("I'm sorry, but I can't write that.", "no passage"),
        ("Here is the spoilt passage:", "no passage"),
        (None, "no answer (length)"),
    ],
)
def test_what_is_no_spoilt_passage_is_told_apart(answer, reason):
    answer = Answer(answer, "length" if answer is None else "stop", 0, 0)
    sample = Sample("", {}, PREFIX, SUFFIX)
    text, why = read_spoilt(answer, sample, load_tokenizer("world"))
    assert (why, text is None) == (reason, bool(reason))
    if text:
        assert text.startswith(" Orlask") and text != SUFFIX and "more" not in text


def test_a_kill_costs_no_answer_and_no_byte(tmp_path, capsys):
    def arguments(name):
        sizes = ["--count=60", "--validation=12", "--concurrency=8"]
        return ["quality", f"--out={tmp_path / name}", f"--rewrite_url={url}", *sizes]

    def requests(name):
        synthetic.main(arguments(name))
        return int(capsys.readouterr().out.splitlines()[-1].split(" ")[0].replace(",", ""))

    answers = tmp_path / "killed/answers.sqlite"
    with running(python("world.teacher", "serve", "--latency=0.05", "--refusals=0.2")) as url:
        process = subprocess.Popen([*python("teachers.sets"), *arguments("killed")], cwd=ROOT)
        wait_for_answers(answers, 20)
        process.kill()
        process.wait()
        answered = wait_for_answers(answers, 20)
        assert not list(answers.parent.glob("quality.*"))
        assert requests("killed") == requests("whole") - answered > 0
    for file in (tmp_path / "whole").glob("quality.*"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def wait_for_answers(path, least):
    for _ in range(600):
        if path.exists():
            try:
                with sqlite3.connect(path) as db:
                    count = db.execute("SELECT count(*) FROM answers").fetchone()[0]
                if count >= least:
                    return count
            except sqlite3.Error:
                pass  # not yet a database
        time.sleep(0.05)
    pytest.fail("no answers came")


def test_parts_take_turns_and_name_their_source(tmp_path):
    for part, count in (("a", 3), ("b", 1)):
        about = {"meta": {"redpajama_set_name": f"RedPajama{part}"}}
        lines = [json.dumps({"text": f"{part}{n}"} | about) for n in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    options = synthetic.parse(
        ["quality", f"--data={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--out=x"]
    )
    read = list(synthetic.documents(options))
    assert [text for text, _ in read] == ["a0", "b0", "a1", "a2"]
    assert read[1][1] == {"source": "RedPajamab"}


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--data=missing.jsonl", "no such file"),
        ("--max_seq=50", "--max_seq twice --chunk"),
        ("--prompts=missing", "no such folder"),
        ("--dials=refusal=1", "there is no dial 'refusal'"),
        ("--dials=refusals=1", "no row .*no passage"),  # a teacher that always refuses
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, flag, words):
    monkeypatch.setattr(synthetic, "PATIENCE", 50)
    with pytest.raises(UserError, match=words) as error:
        synthetic.main(["quality", f"--out={tmp_path}", "--count=16", flag])
    assert "\n" not in str(error.value)
