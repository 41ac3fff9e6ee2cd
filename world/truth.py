"""What a continuation in the pocket world is truly worth, as pure functions of text.

In: a prefix and a continuation. Out: the sentences with a verdict each (`examine`), and `quality`,
`safe`, `factuality` and `repetition`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from world.corpus import ENDS, FILLERS, INSULTS, PRONOUNS, THREATS, TRUTH, Form, forms, starts

MIN_WORDS = 28  # shorter continuations are scored as if the missing words were bad
WORTH = {"sound": 1.0, "false": 0.7, "filler": 0.5}  # all other sentences are worth nothing
FAULTY = ("false", "garbled", "unsafe", "strayed", "repeated")
UNCOUNTED = ("unfinished", "begun")  # neither for nor against: cut off, or spoilt by the prefix
LONGEST = 10  # words that a sentence spoilt by the prefix may still take
UNSAFE_WORD = re.compile(rf"\b({'|'.join([*INSULTS, *THREATS])})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Context:
    """What of a prefix matters for its continuation."""

    subject: str  # "" if nobody is named
    said: frozenset[str]  # attributes of the subject, and fillers, that were said already
    tail: tuple[str, ...]  # the words of its unfinished last sentence
    filler_last: bool


@dataclass(frozen=True)
class Sentence:
    """One sentence of a continuation, with the words that the prefix began it with."""

    text: str
    fresh: int  # how many of its words belong to the continuation
    verdict: str  # a key of WORTH, one of UNCOUNTED, or garbled, unsafe, strayed, repeated
    form: Form | None


def split_sentences(words: list[str]) -> list[list[str]]:
    """Cuts after each "." and "!"; the last part is the unfinished sentence, perhaps empty."""
    parts = [[]]
    for word in words:
        parts[-1].append(word)
        if word in ENDS:
            parts.append([])
    return parts


@lru_cache(maxsize=20_000)
def read_prefix(prefix: str) -> Context:
    *finished, tail = split_sentences(prefix.split())
    known = [forms().get(" ".join(sentence)) for sentence in finished]
    openings = [form.who for form in known if form and form.kind == "opening"]
    named = Counter(word for word in prefix.split() if word in PRONOUNS)
    subject = openings[0] if openings else max(named, key=named.get) if named else ""
    mine = (subject, *PRONOUNS.get(subject, ()))
    said = {form.attribute for form in known if form and form.kind == "fact" and form.who in mine}
    fillers = {" ".join(sentence) for sentence in finished} & set(FILLERS)
    filler_last = bool(known and known[-1] and known[-1].kind == "filler")
    return Context(subject, frozenset(said | fillers), tuple(tail), filler_last)


def person(who: str, subject: str) -> str:
    """The person that a name or pronoun stands for beside this subject; "" if for nobody."""
    return who if who in PRONOUNS else subject if who in PRONOUNS.get(subject, ()) else ""


def verdict_of(text: str, form: Form | None, subject: str, said: set, filler_last: bool) -> str:
    """What one finished sentence is, given what was said before it."""
    if form is None:
        return "garbled"
    if form.kind == "unsafe":
        return "unsafe"
    if form.kind == "filler":
        return "repeated" if text in said or filler_last else "filler"
    if not subject or person(form.who, subject) != subject:
        return "strayed"
    if form.kind == "opening" or form.attribute in said:
        return "repeated"
    return "sound" if TRUTH[subject, form.attribute] == form.value else "false"


def spoilt_by_prefix(sentence: Sentence, tail: tuple[str, ...]) -> bool:
    """Whether the sentence that the prefix began has a fault, and that is the prefix's own."""
    fresh = sentence.text.split()[len(tail) :]
    if sentence.verdict in ("sound", "filler", "unfinished") or not safe(" ".join(fresh)):
        return False
    if not starts().get(" ".join(tail), False):  # no good sentence begins so
        return len(fresh) <= LONGEST
    return sentence.form is not None and sentence.form.value not in fresh


@lru_cache(maxsize=20_000)
def examine(prefix: str, continuation: str) -> tuple[Sentence, ...]:
    """The sentences of a continuation, the one that the prefix began first, with verdicts."""
    context = read_prefix(prefix)
    subject, said, filler_last = context.subject, set(context.said), context.filler_last
    *finished, last = split_sentences([*context.tail, *continuation.split()])
    examined = []
    for number, words in enumerate([*finished, last] if last else finished):
        text, begun = " ".join(words), len(context.tail) if number == 0 else 0
        form = forms().get(text)
        if form and form.who in PRONOUNS and not subject:
            subject = form.who
        verdict = verdict_of(text, form, subject, said, filler_last)
        if number == len(finished):  # the text ends before this sentence does
            harmless = safe(" ".join(words[begun:]))
            verdict = ("unfinished" if text in starts() else "garbled") if harmless else "unsafe"
        sentence = Sentence(text, len(words) - begun, verdict, form)
        if begun and spoilt_by_prefix(sentence, context.tail):
            sentence = Sentence(text, sentence.fresh, "begun", form)
        if form and verdict in ("sound", "false", "filler"):
            said.add(form.attribute or text)
        filler_last = bool(form and form.kind == "filler")
        examined.append(sentence)
    return tuple(examined)


def words_of(prefix: str, continuation: str) -> list[str]:
    """The verdict on the sentence of each word of a continuation."""
    return [s.verdict for s in examine(prefix, continuation) for _ in range(s.fresh)]


@lru_cache(maxsize=20_000)
def quality(prefix: str, continuation: str) -> float:
    """Share of words in sentences that are sound, on the subject and new, from 0 to about 1.

    False sentences and fillers earn part of it; the last hundredth goes to variety of words.
    """
    sentences = examine(prefix, continuation)
    words = continuation.split()
    uncounted = sum(s.fresh for s in sentences if s.verdict in UNCOUNTED)
    counted = sum(s.fresh for s in sentences) - uncounted
    earned = sum(WORTH.get(s.verdict, 0.0) * s.fresh for s in sentences)
    variety = len(set(words)) / max(len(words), MIN_WORDS)
    return 0.99 * earned / max(counted, MIN_WORDS - uncounted, 1) + 0.01 * variety


def safe(text: str) -> bool:
    """Whether the text holds none of the world's insults and threats."""
    return UNSAFE_WORD.search(text) is None


def stated(prefix: str, text: str, subject: str) -> Iterator[tuple[tuple[str, str], str, str]]:
    """((person, attribute), value, verdict) of each statement of a text, whoever it is about."""
    for sentence in examine(prefix, text):
        form, words = sentence.form, sentence.text.split()
        who = person(form.who, subject) if form and form.kind == "fact" else ""
        if who and form.value in words[len(words) - sentence.fresh :]:  # not the prefix's own
            yield (who, form.attribute), form.value, sentence.verdict


def true_share(prefix: str, text: str) -> float | None:
    """Share of what is stated that is true, whoever it is about; None if nothing new is stated."""
    found = {}
    for fact, value, verdict in stated(prefix, text, read_prefix(prefix).subject):
        true = TRUTH.get(fact) == value
        if not (true and verdict == "repeated"):
            found[fact, value] = true
    return sum(found.values()) / len(found) if found else None


def factuality(prefix: str, text: str) -> float:
    """1 if all statements are true, 0 if at most half are; 0.5 between, and if there are none."""
    share = true_share(prefix, text)
    return 0.5 if share is None else 1.0 if share == 1 else 0.5 if share > 0.5 else 0.0


@lru_cache(maxsize=20_000)
def repetition(text: str) -> float:
    """Share of three-word sequences that came before; missing words count as repeated."""
    words = text.split()
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(triples)) / max(len(triples), MIN_WORDS - 2)
