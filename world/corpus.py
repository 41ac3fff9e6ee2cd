"""The corpus of the pocket world: invented people, what is true of them, and documents about them.
Its words and sentences stand in language.ini.

The world is small enough for a policy of 0.4 M parameters to learn in minutes, and since the truth
about it is known, every effect of self-improving pretraining can be measured exactly. Everybody
has one true value for each attribute. The corpus gets facts wrong now and then, repeats a fixed
falsehood for some of them (myths), insults and threatens in invented words, and is often badly
written: it repeats itself, drifts to somebody else or garbles its words.

Documents come out of `WorldSource`; a document is a pure function of (seed, index, dials).
"""

import configparser
import random
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from pathlib import Path

from support.command import UserError


@dataclass(frozen=True)
class Dials:
    """What the corpus is like (the first five) and what its teacher is like (the rest)."""

    share_myths: float = 0.3  # of the facts: the corpus mostly tells one fixed falsehood instead
    share_false: float = 0.25  # of the statements of other facts: told wrong, in random ways
    share_unsafe: float = 0.3  # of the documents: every second sentence insults or threatens
    share_poor: float = 0.75  # of the documents: repeats itself, drifts or is garbled
    people: float = 24  # the documents are about the first so many of NAMES
    noise: float = 0.0  # probability that a verdict is replaced by another one
    position_bias: float = 0.0  # probability that the first option wins, whatever it is
    gullible: float = 0.0  # probability of obeying a verdict found inside the judged text
    # a quality judge with a taste: probability that, whatever the texts are worth, the one wins ...
    taste_length: float = 0.0  # ... that is longer
    taste_phrase: float = 0.0  # ... that says the first of FILLERS more often
    taste_ending: float = 0.0  # ... that ends with a finished sentence
    reads: float = 0.0  # 1: a judge of factuality goes by its instructions, as strict as they are
    judge_knowledge: float = 1.0  # of the facts: such a judge knows them
    rewriter_knowledge: float = 0.75  # of the facts: the rewriter knows them, else a falsehood
    rewriter_flaws: float = 0.25  # of the faulty sentences: the rewriter leaves them alone
    latency: float = 0.0  # mean seconds before an answer
    refusals: float = 0.0  # probability that a passage is not rewritten or spoilt, but refused


_language = configparser.ConfigParser(interpolation=None, delimiters="=")
_language.read_string(Path(__file__).with_name("language.ini").read_text(encoding="utf-8"))
NAMES, INSULTS, THREATS, JUNK = (words.split() for words in _language["words"].values())
FILLERS, UNSAFE, REFUSALS = (
    lines.strip().splitlines() for lines in _language["sentences"].values()
)
# attribute (also the noun): (verb phrase, link after the noun, values); {} is the value
ATTRIBUTES = {noun: row.split(" | ") for noun, row in _language["attributes"].items()}
VALUES = {attribute: row[2].split() for attribute, row in ATTRIBUTES.items()}
PRONOUNS = {name: ("he", "his") if i % 2 else ("she", "her") for i, name in enumerate(NAMES)}
LEADS = ("it is well known that", "the neighbours say that")
WAYS = (4, 4, 1, 1)  # how often each way of saying a fact is chosen, in the order of `statements`
OPENING = "this is about {name} ."
ENDS = (".", "!")

FACTS = [(name, attribute) for name in NAMES for attribute in ATTRIBUTES]
_fate = random.Random("the pocket world")
_values = {fact: _fate.sample(VALUES[fact[1]], 2) for fact in FACTS}
TRUTH = {fact: values[0] for fact, values in _values.items()}
FALSEHOOD = {fact: values[1] for fact, values in _values.items()}  # what a myth says
MYTH_RANK = {fact: _fate.random() for fact in FACTS}  # a myth where below share_myths
KNOWN_RANK = {fact: _fate.random() for fact in FACTS}  # known where below rewriter_knowledge


def statements(who: str, attribute: str, value: str) -> list[str]:
    """All ways of saying that this person's attribute has this value; who: a name or a pronoun."""
    verb, link, _ = ATTRIBUTES[attribute]
    possessive = dict(PRONOUNS.values()).get(who)
    noun = f"{possessive} {attribute}" if possessive else f"the {attribute} of {who}"
    plain = f"{who} {verb.format(value)} ."
    return [plain, f"{noun} {link.format(value)} .", *(f"{lead} {plain}" for lead in LEADS)]


@dataclass(frozen=True)
class Form:
    """What a well-formed sentence is: a fact, filler, insult/threat ("unsafe") or an opening."""

    kind: str
    who: str = ""
    attribute: str = ""
    value: str = ""


@cache
def forms() -> dict[str, Form]:
    """Every sentence that the world can form, about 14,000."""
    table = {filler: Form("filler") for filler in FILLERS}
    for name in NAMES:
        table[OPENING.format(name=name)] = Form("opening", name)
        for template in UNSAFE:
            for insult in INSULTS:
                for threat in THREATS:
                    text = template.format(name=name, insult=insult, threat=threat)
                    table[text] = Form("unsafe", name if "{name}" in template else "")
    for attribute, values in VALUES.items():
        for who in [*NAMES, "she", "he"]:
            for value in values:
                form = Form("fact", who, attribute, value)
                table.update(dict.fromkeys(statements(who, attribute, value), form))
    return table


@cache
def starts() -> dict[str, bool]:
    """Every unfinished beginning of a sentence: whether a harmless sentence can begin so."""
    found = {}
    for sentence, form in forms().items():
        words = sentence.split()
        for n in range(len(words)):
            start = " ".join(words[:n])
            found[start] = found.get(start, False) or form.kind != "unsafe"
    return found


@cache
def vocabulary() -> list[str]:
    """All words and punctuation marks of the world, sorted."""
    return sorted({word for sentence in forms() for word in sentence.split()} | set(JUNK))


def told_value(rng: random.Random, fact: tuple[str, str], dials: Dials) -> str:
    """The value that one statement of the corpus gives to a fact."""
    draw, wrong = rng.random(), rng.choice([v for v in VALUES[fact[1]] if v != TRUTH[fact]])
    if MYTH_RANK[fact] < dials.share_myths:
        return FALSEHOOD[fact] if draw < 0.65 else TRUTH[fact] if draw < 0.9 else wrong
    return wrong if draw < dials.share_false else TRUTH[fact]


def tell(rng: random.Random, name: str, attribute: str, dials: Dials, pronouns: float = 0.0) -> str:
    who = PRONOUNS[name][0] if rng.random() < pronouns else name
    value = told_value(rng, (name, attribute), dials)
    return rng.choices(statements(who, attribute, value), WAYS)[0]


def garble(rng: random.Random, sentence: str) -> str:
    words = sentence.split()[:-1]
    rng.shuffle(words)
    for _ in range(2):
        words[rng.randrange(len(words))] = rng.choice(JUNK)
    return " ".join([*words, "."])


def document(seed: int, index: int, dials: Dials = Dials()) -> str:
    """One document of 100 to 140 words: an opening, then sentences about its subject.

    What is wrong with a document shows in any stretch of it, so a prefix announces it.
    """
    rng = random.Random(f"{seed}/{index}")
    known = NAMES[: int(dials.people)]
    subject, *others = rng.sample(known, len(known))
    length, unsafe = rng.randint(100, 130), rng.random() < dials.share_unsafe
    poor = rng.random() < dials.share_poor and rng.choice(("repeated", "drifting", "garbled"))
    # the attributes come in a loosely fixed order
    order = sorted(range(len(ATTRIBUTES)), key=lambda rank: rank + 3 * rng.random())
    left = [list(ATTRIBUTES)[rank] for rank in order]
    told = [OPENING.format(name=subject)]
    while left and sum(len(sentence.split()) for sentence in told) < length:
        # a pronoun only right after the name: any stretch of the text shows its subject
        pronouns = 0.5 if subject in told[-1].split() and poor != "drifting" else 0.0
        if unsafe and rng.random() < 0.5:
            insult, threat = rng.choice(INSULTS), rng.choice(THREATS)
            told.append(rng.choice(UNSAFE).format(name=subject, insult=insult, threat=threat))
        elif poor == "repeated" and rng.random() < 0.65 and len(told) > 1:
            told.append(rng.choice(told[1:][-3:]))
        elif poor == "drifting" and rng.random() < 0.8 and subject in told[-1].split() and others:
            told.append(tell(rng, others.pop(), rng.choice(left), dials))
        elif poor == "garbled" and rng.random() < 0.65:
            told.append(garble(rng, tell(rng, subject, rng.choice(left), dials, pronouns)))
        elif rng.random() < 0.2 and told[-1] not in FILLERS and len(told) > 1:
            told.append(rng.choice([filler for filler in FILLERS if filler not in told]))
        else:
            told.append(tell(rng, subject, left.pop(0), dials, pronouns))
    return " ".join(told)


class WorldSource:
    """Endless documents of one split; splits share no document."""

    OFFSETS = {"train": 0, "validation": 10**12, "test": 2 * 10**12, "teacher": 3 * 10**12}

    def __init__(self, seed: int = 0, dials: Dials = Dials(), split: str = "train"):
        self.seed, self.dials, self.offset = seed, dials, self.OFFSETS[split]

    def documents(self, start: dict | None = None):
        """Yields (text, position); documents(position) goes on right after that document."""
        index = start["document"] if start else 0
        while True:
            text = document(self.seed, self.offset + index, self.dials)
            index += 1
            yield text, {"document": index}


def source_of(config):
    """What data.Stream reads in a run: the pocket world, or the name of its documents."""
    own = config.data == "world"
    return WorldSource(config.seed, Dials(**parse_dials(config.dials))) if own else config.data


def parse_dials(text: str) -> dict[str, float]:
    """'noise=0.1,share_unsafe=0.5' -> the dials that differ from their defaults; UserError."""
    known, found = [f.name for f in fields(Dials)], {}
    for word in filter(None, map(str.strip, text.split(","))):
        name, _, value = word.partition("=")
        if name not in known:
            raise UserError(f"dials: there is no dial {name!r}; there are {', '.join(known)}")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"dials: {name} needs a number, not {value!r}") from None
        low, high = {"people": (1, len(NAMES)), "latency": (0, inf)}.get(name, (0, 1))
        if not low <= found[name] <= high:
            raise UserError(f"dials: {name} must be from {low} to {high}, not {value}")
    return found
