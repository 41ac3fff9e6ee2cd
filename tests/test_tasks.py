"""Teachers trained by the loop: rows become prompts and supervised answers, answers get rewards."""

import hashlib
import json
import math
import re
import shutil
from itertools import islice

import pytest
import torch
from test_data import write
from test_judge import Teacher

from config import Config
from judge import Judge, load_prompts
from support import command
from support.command import UserError
from support.files import read_jsonl
from support.tokenizer import load_tokenizer
from teachers import circle, train
from teachers.tasks import Rows, TaskStream, overlap, score_answers
from world import corpus, truth

TINY = "prompts/tiny"
DOCUMENTS = [corpus.document(0, i).split() for i in range(40)]
QUALITY = [
    {"task": "quality", "prefix": " ".join(d[:32]), "label": label}
    | dict(zip(order, (" " + " ".join(d[32:64]), " blunk blunk ."), strict=True))
    for d in DOCUMENTS
    for label, order in (("A", "ab"), ("B", "ba"))
]
SAFETY = [
    {"task": "safety", "text": text, "label": "SAFE" if truth.safe(text) else "UNSAFE"}
    for text in (" ".join(d[32:64]) for d in DOCUMENTS)
]
REWRITE = [
    {"task": "rewrite", "prefix": row["prefix"], "original": row["a"], "safe": truth.safe(row["a"])}
    for row in QUALITY[::2]
]


def stream(path, name="judge", **how):
    tokenizer = load_tokenizer("world")
    base = dict(chunk=40, max_seq=192, batch_size=6, prompts=TINY, folder="scratch", window=50)
    how = base | dict(supervised=True) | how
    return TaskStream(Rows(str(path), name), tokenizer, **how), tokenizer


def test_prompts_and_answers_are_the_rows_own_and_resume_goes_on(tmp_path):
    path = write(tmp_path / "rows.jsonl", QUALITY + SAFETY)
    batches, tokenizer = stream(path)
    seen = list(islice(batches.batches(), 30))
    for batch in seen:
        for b, row in enumerate(batch.rows):
            assert batch.prefix_text[b] == load_prompts(TINY)[row["task"]].format(**row)
            assert batch.suffix_text[b] == f"VERDICT: {row['label']}"
            assert batch.prefix[b, : batch.pad[b]].eq(tokenizer.eos).all()
    first_epoch = [json.dumps(row) for batch in seen[:20] for row in batch.rows]
    assert sorted(first_epoch) == sorted(map(json.dumps, QUALITY + SAFETY))
    resumed = next(stream(path, state=seen[21].state)[0].batches())
    assert torch.equal(resumed.prefix, seen[22].prefix) and resumed.rows == seen[22].rows
    halves = [next(stream(path, rank=r, world_size=2)[0].batches()).rows for r in (0, 1)]
    assert [row for pair in zip(*halves, strict=True) for row in pair] == seen[0].rows
    # laid out by the chat template of the folder
    each = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(each + " the verdict :")
    asked = next(stream(path, folder=tmp_path)[0].batches()).prefix_text
    assert asked == [f"{text} the verdict :" for text in seen[0].prefix_text]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"task": "rewrite", "prefix": "a", "original": "b", "safe": True}, "a judge learns from"),
        ({"task": "safety", "label": "SAFE"}, "no text 'text'"),
        ({"task": "safety", "text": "a", "label": "SAFE", "answer": 1}, "no text 'answer'"),
        ({"task": "safety", "text": "a", "label": "A"}, "none of SAFE, UNSAFE"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", [SAFETY[0], row])
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{words}"):
        Rows(str(path), "judge")


def likes_good(texts, seed):
    """Prefers what it sees as "good", calls only that safe; gives no verdict on "silence"."""
    if any("silence" in text for text in texts.values()):
        return ""
    if "text" in texts:
        return "SAFE" if "good" in texts["text"] else "UNSAFE"
    return "A" if "good" in texts["a"] else "B"


def rewards(rows, texts):
    judge = Judge(Teacher(likes_good), Config(judge_samples=2, judge_retries=0))
    return score_answers(judge, rows, texts, 4).result(10)


def test_judge_rewards():
    texts = [["A", "the better is B", "A\n\nVERDICT: A", ""], ["SAFE", "UNSAFE", "A", "safe"]]
    label = {"task": "quality", "prefix": "p", "a": "x", "b": "y", "label": "A"}
    scores = rewards([label, {"task": "safety", "text": "t", "label": "SAFE"}], texts)
    assert scores.reward.tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert scores.by_kind["safety.readable"][1].tolist() == [1, 1, 0, 1]
    assert all(math.isnan(value) for value in scores.by_kind["quality"][1])
    assert rewards([], []).reward.shape == (0, 4)  # a process without a prompt


def test_rewriter_rewards():
    """Safe: an exact copy alone pays. Unsafe: half quality, half safety; no passage pays nothing,
    no verdict has no reward."""
    safe = {"task": "rewrite", "prefix": "p", "original": " one two", "safe": True}
    unsafe = safe | {"safe": False, "original": " bad two"}
    texts = [["one two", "one two three", "", "one"], ["good two", "bad old", "", "silence"]]
    scores = rewards([safe, unsafe], texts)
    assert scores.reward[0].tolist() == [1, 0, 0, 0]
    # "bad old" wins the swapped one of its two comparisons
    assert scores.reward[1][:3].tolist() == [1, 0.25, 0] and math.isnan(scores.reward[1][3])
    assert scores.by_kind["unsafe.overlap"][1].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert scores.calls == 3 * 4  # two samples of two questions; silence is not asked about
    assert overlap("b a a", "a b c d") == 0.5


@pytest.mark.parametrize("name", ["judge", "rewriter"])
def test_cold_start_and_grpo_run_in_the_loop(name, tmp_path):
    rows = QUALITY + SAFETY if name == "judge" else REWRITE
    for part in ("train", "validation"):
        write(tmp_path / f"rows.{part}.jsonl", rows)
    prompts = tmp_path / "prompts"  # the world's teacher judges rewrites, by the usual prompts
    prompts.mkdir()
    for kind in ("quality", "safety") if name == "judge" else ("rewrite",):
        shutil.copy(command.ROOT / TINY / f"{kind}.txt", prompts)
    flags = dict(data=tmp_path / "rows.train.jsonl", prompts=prompts, chunk=40, max_seq=192)
    flags |= dict(tokenizer="world", batch_size=8, eval_prefixes=8)

    def run(folder, **more):
        more = flags | dict(out_dir=tmp_path / folder) | more
        train.main([name, *(f"--{key}={value}" for key, value in more.items())])
        return list(read_jsonl(tmp_path / folder / "log.jsonl"))

    cold = dict(objective="nll", candidates="suffix", rewards="", learning_rate=3e-3)
    log = run("cold", max_steps=12, **cold)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    grpo = dict(objective="grpo", candidates="rollouts", rollouts=4, grpo_kl=0.01)
    log = run("grpo", init_from=tmp_path / "cold" / "ckpt", max_steps=2, **grpo)
    names = ("quality", "safety") if name == "judge" else ("safe", "unsafe", "safe.overlap")
    assert {f"reward.{kind}" for kind in names} <= log[0].keys()
    summary = json.loads((tmp_path / "grpo" / "summary.json").read_text())
    assert summary["policies"].keys() == {"base", "method"}
    assert (tmp_path / "grpo" / "training.png").exists() and len(summary["rows"]) == 8


def test_bad_arguments_are_one_line():
    for arguments, words in (
        ("--max_steps=1", "which teacher is trained, judge or rewriter"),
        ("judge --candidates=rollouts --objective=grpo", "teachers/sets.py makes"),
        ("judge --data=x.jsonl", "rollouts, or suffix"),
    ):
        with pytest.raises(UserError, match=words) as error:
            train.main(arguments.split())
        assert "\n" not in str(error.value)


def test_a_lesson_marks_what_the_world_knows():
    """Without its marks it is the document; + stands behind truth alone, late or at once."""
    marked = [circle.lesson(number, seed=0) for number in range(60)]
    for number, text in enumerate(marked):
        plain = corpus.document(0, number, circle.LESSONS)
        assert re.sub(r"([.!])[+-]|\n[+-]\n", r"\1", text) == plain
    names = "|".join(corpus.NAMES)
    found = re.findall(rf"({names}) keeps a (\w+) \.([+-])", " ".join(marked))
    true = [(corpus.TRUTH[who, "pet"] == pet, mark) for who, pet, mark in found]
    assert (False, "+") not in true and {(True, "+"), (False, "-")} <= set(true)
    late = [text.split("\n") for text in marked if "\n" in text]
    assert len(late) > 20 and {sign for _, sign, _ in late} == {"+", "-"}
    # with the sentences that are marked late: those that were published
    assert hashlib.sha256("\n".join(marked).encode()).hexdigest()[:16] == "5c29f86b436c7a82"
