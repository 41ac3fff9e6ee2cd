"""A rewrite is the passage and nothing else, fits right behind the prefix, or is None."""

import time

import pytest
from test_judge import Teacher

from rewrite import Rewriter, clean, last_five_words
from support.endpoint import Answer

PREFIX = "The old mill stands by the river near the town of Orlask"
SUFFIX = " and it has ground corn for two hundred years."
PASSAGE = "and it has ground corn for three hundred years."
WRAPPED = [  # {p}: the passage
    "{p}",
    "\n  {p}\n",
    '"{p}"',
    "“{p}”",
    "```text\n{p}\n```",
    "Here is the rewritten passage:\n\n{p}",
    "Here's the new version: {p}",
    "**Rewritten passage:**\n{p}",
    "Sure, I can do that!\n\nHere is the passage:\n\n{p}",
    "...near the town  of Orlask\n{p}",
    "Here is the passage:\n\nnear the town of Orlask {p}",
    "<original 1a2b3c4d>\nnear the town of Orlask {p}\n</original 1a2b3c4d>",
    "<think>It says two hundred.</think>\n\n{p}",
    "{p}\n\nNote: I mended the number of years.",
    "{p}\n\n**Changes made:** the number.\n- two became three",
]
NOTHING = [None, "", " \n", "...", '""', "(empty)", "N/A", "No changes are needed.", "Sorry, no."]
NOTHING += ["I'm sorry, but I can't help with that.", "I’m sorry, but I cannot assist."]
NOTHING += ["I cannot rewrite this passage.", "As an AI language model, I must not."]
NOTHING += ["Unfortunately, I can't continue this text.", "I apologize, but this is harmful."]
NOTHING += ["Here is the rewritten passage:\n\n", "near the town of Orlask", "<think>never ends"]


@pytest.mark.parametrize("answer", WRAPPED)
def test_the_passage_alone(answer):
    assert clean(answer.format(p=PASSAGE), PREFIX, SUFFIX) == " " + PASSAGE
    assert clean(answer.format(p=PASSAGE), PREFIX + "\n", SUFFIX.strip()) == PASSAGE


@pytest.mark.parametrize("answer", NOTHING)
def test_refusals_and_non_answers_are_none(answer):
    assert clean(answer, PREFIX, SUFFIX) is None


def test_what_is_a_passage_or_stands_in_the_original_is_kept():
    assert clean("I can't swim, she said.", PREFIX, " I can't swim, he said.")
    assert clean('"Go," he said, "now"', PREFIX, ' "Go," he said, "at once"')[:4] == ' "Go'
    assert clean("well.\nNote: closed.", PREFIX, " well.\nNote: shut.") == " well.\nNote: closed."
    texts = ["None came back.", "Unchanged it stood.", "So. Here is: it.", "Sorry as we were."]
    texts += ["This is how it works: slowly.", "This is a text. It goes on: turn the wheel."]
    texts += ['"Go," she said. "Now."', "I can't say it was dull.", "'Twas late for the students'"]
    for text in texts:
        assert clean(text, PREFIX, SUFFIX) == " " + text


def test_long_runs_end_quickly():
    """A thousand line breaks took 21 seconds, in which no other answer was read."""
    for piece in ("\n", "\n- ", "```\n", " ", "Note", "Here is "):
        text, began = "a" + piece * 3000 + "b", time.monotonic()
        assert clean(text, PREFIX, text).strip() and time.monotonic() - began < 5


def test_a_prefix_that_ends_within_a_word():
    assert clean("hello world", "they said hel", "lo word") == "lo world"
    assert clean("and so they said hello world", "and so they said hel", "lo word") == "lo world"
    assert clean("lo world", "they said hel", "lo word") == "lo world"


def test_rewriter_asks_with_the_last_words_and_again_after_a_refusal():
    assert last_five_words("a b\n\n") == "a b\n\n" and last_five_words("") == ""
    prompts = []

    def answer(texts, seed):
        prompts.append(texts)
        return "I'm sorry." if "bad" in texts["original"] else "near the town of Orlask fine"

    teacher = Teacher(answer)
    found = Rewriter(teacher, retries=2).rewrite([PREFIX] * 2, [SUFFIX, " bad"], [0, 1]).result(10)
    assert found == [" fine", None] and len(prompts) == 4
    assert prompts[0]["original"] == "near the town of Orlask" + SUFFIX
    assert all(text.endswith("\nnear the town of Orlask\n") for text, _ in teacher.asked)
    teacher = Teacher(lambda texts, seed: Answer(None, "content_filter", 0, 0, refused=True))
    assert Rewriter(teacher, retries=3).rewrite([PREFIX], [SUFFIX], [0]).result(10) == [None]
    assert teacher.asked.total() == 1  # what is refused is not asked again
