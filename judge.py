"""Judging: questions to a judge, and from its verdicts rewards over the candidates of a prefix.

In: prefixes, original suffixes and candidate texts; a `Chat` that speaks to the teacher.
Out: `Scores` (rewards [B, C], nan where there is no verdict); every pool is kept in the run's
SQLite file, so that a finished run can be scored again without a judge (tools/replay.py).
"""

import asyncio
import functools
import hashlib
import json
import re
import zlib
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import Config, parse_rewards
from schedules import schedule
from support.command import UserError
from verdicts import VERDICTS, parse

# Where a text spells a special token of some model's chat template: servers read it as one, and
# what follows as another turn of the dialogue.
SPECIAL = re.compile(
    r"<(?=[|｜][^<>\n]{1,60}[|｜]>|/?s>|</?SYS>|/?think(?:ing)?>|(?:start|end)_of_\w+>"
    r"|(?:bos|eos|pad|unk|sop)>|\w+_TOKEN>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\])",
    re.I,
)

OPEN = 4096  # questions rendered at a time: bounds memory, exceeds what a client has in flight

# ---------------------------------------------------------------------------------------------
# Prompts


FIELD = re.compile(r"\{(\w+)\}")  # where a template shows a text


def load_prompts(folder="prompts"):
    """Templates by name. A folder of one's own, given as a path (./prompts, mine), replaces those
    it has and ours fill the rest; "prompts" means ours, wherever the command is started."""
    folders = [Path(__file__).with_name("prompts")]
    if folder not in ("", "prompts"):
        folders.append(Path(folder).expanduser())
        if not folders[1].is_dir():
            raise UserError(f"prompts: no such folder: {folder}")
    found = {}
    for file in (file for each in folders for file in sorted(each.glob("*.txt"))):
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: {error}: save it as UTF-8") from None
        shown, known = (set(FIELD.findall(t)) for t in (template, found.get(file.stem, template)))
        if not shown - {"mark"} or not shown <= known | {"mark"}:
            fields = ", ".join(f"{{{name}}}" for name in sorted(known - {"mark"}))
            raise UserError(
                f"{file}: a prompt of this name shows some of {fields or '{text}'}, alone"
            )
        found[file.stem] = template
    return found


def render(template, **texts):
    """Fill a template in a single pass: a text is never read as a template. {mark} becomes a word
    that stands in none of the texts, so that no text can close its own section; it depends on the
    first text only, so that questions about one prefix share their head (prefix caching). Special
    tokens that a text spells are defused."""
    names = [name for name in FIELD.findall(template) if name != "mark"]
    texts = {name: defuse(texts[name]) if texts[name].strip() else "(empty)" for name in names}
    mark = hashlib.sha256(texts[names[0]].encode("utf-8", "replace")).hexdigest()[:8]
    while any(mark in text for text in texts.values()):
        mark = hashlib.sha256(mark.encode()).hexdigest()[:8]
    return FIELD.sub(lambda m: texts.get(m[1], mark), template)


@functools.lru_cache(OPEN)  # a text is shown in many questions
def defuse(text):
    """The text with a space in each spelled special token, so that no server reads it as one."""
    return SPECIAL.sub(lambda match: match[0] + " ", text)


def question_seed(*parts):
    """31 bits that depend on what is asked, never on when."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------
# Rewards


@dataclass
class Scores:
    """Rewards of B pools of C candidates; nan = absent (failed rewrite, or no verdict)."""

    reward: np.ndarray  # [B, C], weighted sum over the kinds
    by_kind: dict  # kind -> [B, C]
    calls: int  # answers asked for
    failed: int  # of these, answers without a readable verdict
    absent: int  # questions left without a verdict after all retries
    examples: list  # of the first pool: {"kind", "candidates" shown, "verdict", "answer"}


@dataclass
class Group:
    """One prefix, the distinct texts that continue it, and what was asked about them."""

    prefix: str
    reference: str
    texts: list
    pivot: int  # the text with which the pivot schedule compares all others
    key: int  # global sample number
    tally: Counter = field(default_factory=Counter)
    verdicts: list = field(default_factory=list)


class Judge:
    """What a teacher thinks of texts, asked through `chat` as the config's keys say.

    A race, or pairs that are asked several times, alternate their order. An answer without a
    readable verdict is asked again up to judge_retries times, with a fresh seed, before the verdict
    is absent. store: the chat's, where pools are to be kept for tools/replay.py.
    """

    def __init__(self, chat, config: Config | None = None, store=None):
        self.chat, self.config, self.store = chat, config or Config(), store
        c = self.config
        self.weights, self.prompts = parse_rewards(c.rewards), load_prompts(c.prompts)
        self.sampling = dict(temperature=c.judge_temperature, top_p=c.judge_top_p)
        self.sampling["max_tokens"] = c.judge_max_tokens
        if store:
            store.create(POOLS)
        self.open = asyncio.Semaphore(OPEN)
        self.tally: Counter = Counter()  # of questions asked one by one, through `verdict`

    def small_question(self):
        """One that any judge can answer, for `chat.greet`."""
        return render(self.prompts["safety"], text="The sun is out.")

    def score(self, step, prefixes, references, candidates, sources, index):
        """Rewards of candidates[b][c] (None: a failed rewrite) as a Future of Scores. `sources`
        names the C candidates; `index` are the global sample numbers that key all chance."""
        return self.chat.run(self._score(step, prefixes, references, candidates, sources, index))

    async def _score(self, step, prefixes, references, candidates, sources, index):
        rows = list(zip(prefixes, references, candidates, index, strict=True))
        groups = [new_group(*row, sources) for row in rows]
        worth = await together(self._group(group) for group in groups)  # kind -> text -> value
        by_kind = {
            kind: np.array(
                [
                    [np.nan if text is None else values[kind].get(text, 0.0) for text in row]
                    for values, row in zip(worth, candidates, strict=True)
                ]
            ).reshape(-1, len(sources))  # also of no pool at all
            for kind in self.weights
        }
        reward = sum(weight * by_kind[kind] for kind, weight in self.weights.items())
        if self.store:
            kept = await asyncio.to_thread(pack_pools, step, sources, rows, reward)
            await self.store.add("INSERT OR REPLACE INTO pools VALUES (?, ?, ?)", *kept)
        tally = sum((group.tally for group in groups), Counter())
        counts = (tally["calls"], tally["failed"], tally["absent"])
        first = groups[0].verdicts if groups else []
        examples = sorted(first, key=lambda seen: (seen["kind"], seen["candidates"]))
        return Scores(reward, by_kind, *counts, examples)

    async def _group(self, group):
        """kind -> text -> value between 0 and 1, nan without a verdict."""
        kinds = [kind for kind in self.weights if kind != "quality"]
        every = [[i] for i in range(len(group.texts))]
        each = (together([self._of_group(kind, group, one) for one in every]) for kind in kinds)
        alone = asyncio.ensure_future(together(each))
        asked = [self._compare(group, alone)] if "quality" in self.weights else []
        *quality, others = await together([*asked, alone])
        worth = zip(["quality"] * len(quality) + kinds, [*quality, *others], strict=True)
        return {kind: dict(zip(group.texts, values, strict=True)) for kind, values in worth}

    async def _compare(self, group, alone):
        """Asks the schedule's rounds and returns its scores. A race waits for the other rewards."""
        bonus, comparisons = np.zeros(len(group.texts)), self.config.comparisons
        if comparisons.startswith("race") and len(self.weights) > 1:
            weights = [weight for kind, weight in self.weights.items() if kind != "quality"]
            bonus = weights @ np.array(await alone) / self.weights["quality"]
        rng = np.random.default_rng([self.config.seed, group.key])
        rounds = schedule(comparisons, len(group.texts), group.pivot, rng, bonus)
        outcomes, times = None, Counter()  # how often a pair was asked in this order before
        while True:
            try:
                pairs = rounds.send(outcomes)
            except StopIteration as done:
                return done.value
            asked = []
            for pair in pairs:
                asked.append(self._of_group("quality", group, pair, times[pair]))
                times[pair] += 1
            outcomes = await together(asked)

    async def _of_group(self, kind, group, shown, repeat=0):
        """The value of the first (or only) text of a group shown; repeat: for how many-th time."""
        texts, samples = [group.texts[i] for i in shown], self.config.judge_samples
        numbers = dict(samples=samples, first=repeat * samples, seen=group.verdicts)
        how = dict(tally=group.tally, prefix=group.prefix, reference=group.reference)
        return await self.worth(kind, *texts, **numbers, **how)

    async def worth(self, kind, *shown, samples=1, both_orders=False, first=0, seen=None, **how):
        """What the judge thinks of a text, or of the first of a pair, between 0 and 1: the mean
        over `samples` questions numbered from `first`, nan where none has a verdict. A pair is
        shown in both orders, each `samples` times, or else in turns. how: as for `verdict`, with
        the other texts that the prompt shows. seen: a list to which every verdict is added."""
        turns = [(n, swap) for n in range(samples) for swap in (False, True)]
        if not both_orders:
            turns = [(n, n % 2 == 1 and len(shown) == 2) for n in range(samples)]
        asked = [self._one(kind, shown, swap, first + n, seen, how) for n, swap in turns]
        values = [value for value in await together(asked) if value is not None]
        return sum(values) / len(values) if values else np.nan

    async def _one(self, kind, shown, swap, sample, seen, how):
        """The value of one question to the first text shown, None without a verdict."""
        shown = list(shown[::-1] if swap else shown)
        texts = dict(zip(("a", "b") if len(shown) == 2 else ("text",), shown, strict=True))
        label, answer = await self.verdict(kind, sample, **texts, **how)
        if seen is not None:
            seen.append(dict(kind=kind, candidates=shown, verdict=label, answer=answer))
        if label is None:
            return None
        return 1 - VERDICTS[kind][label] if swap else VERDICTS[kind][label]

    async def verdict(self, kind, sample=0, tally=None, prompt=None, temperature=None, **texts):
        """(label, answer): a key of VERDICTS[kind] and the answer it was read from; label None if
        none could be read. The seed is keyed by what is asked, so order of arrival never matters.
        `prompt` names another template that is answered in the same form; `temperature` is another
        than the judge's."""
        tally = self.tally if tally is None else tally
        how = self.sampling if temperature is None else self.sampling | {"temperature": temperature}
        async with self.open:
            question = render(self.prompts[prompt or kind], **texts)
            for attempt in range(1 + self.config.judge_retries):
                seed = question_seed(self.config.seed, question, sample, attempt)
                answer = await self.chat.ask(question, seed=seed, **how)
                tally["calls"] += 1
                if label := parse(kind, answer.text):
                    return label, answer.text
                tally["failed"] += 1
                if answer.text is None and answer.refused:
                    break
        tally["absent"] += 1
        return None, answer.text


def first_wins(step: int, pool) -> Future:
    """Scores without a judge: whoever is named first in config.candidates wins; nan: no rewrite.

    pool: a candidates.Pool."""
    rank = -np.arange(pool.lengths.shape[1], dtype=float)
    scores: Future = Future()
    scores.set_result(Scores(np.where(pool.lengths == 0, np.nan, rank), {}, 0, 0, 0, []))
    return scores


def new_group(prefix, reference, candidates, key, sources):
    """Equal texts are judged once and share their score; one without a word is 0 in every kind
    without asking, for it must never pay to say nothing."""
    texts = list(dict.fromkeys(text for text in candidates if text and text.strip()))
    suffix = dict(zip(sources, candidates, strict=True)).get("suffix")
    pivot = texts.index(suffix) if suffix in texts else 0
    return Group(prefix, reference, texts, pivot, key)


async def together(coroutines):
    """asyncio.gather that leaves nothing running when one fails or the whole is cancelled."""
    coroutines = list(coroutines)
    if len(coroutines) == 1:
        return [await coroutines[0]]  # a task costs as much as rendering a question
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# ---------------------------------------------------------------------------------------------
# Pools kept for replay

POOLS = "pools (step INTEGER, key INTEGER, pool BLOB, PRIMARY KEY (step, key)) WITHOUT ROWID"


def pack_pools(step, sources, rows, rewards):
    """One compressed row a pool: [prefix, reference, candidates, sources, rewards]."""
    return [
        (step, key, zlib.compress(json.dumps([prefix, reference, texts, sources, reward]).encode()))
        for (prefix, reference, texts, key), reward in zip(rows, rewards.tolist(), strict=True)
    ]
