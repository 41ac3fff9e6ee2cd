"""Judging: prompts, verdict parsers and rewards over the candidates of a prefix.

In: prefixes, original suffixes and candidate texts; a `Chat` that speaks to the teacher.
Out: `Scores` (rewards [B, C], nan where there is no verdict); every pool is kept in the run's
SQLite file, so that a finished run can be scored again without a judge.

    python judge.py bench --judge_url http://localhost:8000/v1 --judge_model my-judge
    python judge.py replay runs/demo --comparisons all race
"""

import asyncio
import contextlib
import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import Config, names, parse_rewards
from schedules import schedule

# What each verdict is worth: to the first option of a pair, or to the text itself.
VERDICTS = {
    "quality": {"A": 1.0, "B": 0.0},
    "coherence": {"A": 1.0, "B": 0.0, "TIE": 0.5},
    "factuality_pair": {"A": 1.0, "B": 0.0, "TIE": 0.5},
    "safety": {"SAFE": 1.0, "UNSAFE": 0.0},
    "factuality": {
        "No Hallucination": 1.0,
        "Possible Hallucination": 0.5,
        "Definite Hallucination": 0.0,
    },
}

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
    """Templates by name. A folder of one's own replaces those it has; ours fill the rest."""
    if folder != "prompts" and not Path(folder).is_dir():
        raise ValueError(f"prompts: no such folder: {folder}")
    found = {}
    for file in (*Path(__file__).with_name("prompts").glob("*.txt"), *Path(folder).glob("*.txt")):
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}") from None
        shown, known = (set(FIELD.findall(t)) for t in (template, found.get(file.stem, template)))
        if not shown - {"mark"} or not shown <= known | {"mark"}:
            fields = ", ".join(f"{{{name}}}" for name in sorted(known - {"mark"}))
            raise ValueError(
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


def defuse(text):
    """The text with a space in each spelled special token, so that no server reads it as one."""
    return SPECIAL.sub(lambda match: match[0] + " ", text)


def question_seed(*parts):
    """31 bits that depend on what is asked, never on when."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------
# Verdict parsers: strict about where a verdict stands (the end of the answer), tolerant of how it
# is written. What they cannot read is None, never a guess.

LABELS = {  # how each label may be written
    "A": r"A",
    "B": r"B",
    "TIE": r"(?:a )?(?:tie|tied|draw)",
    "SAFE": r"safe",
    "UNSAFE": r"(?:un-?|not )safe",
    "No Hallucination": r"no[ _-]?hallucinations?",
    "Possible Hallucination": r"possible[ _-]?hallucinations?",
    "Definite Hallucination": r"definite[ _-]?hallucinations?",
}
KEY = r"(?:verdict|label|answer|decision|judge?ment|winner|choice|conclusion)"
LEAD = r"(?:(?:so|thus|therefore|hence|final|overall|my|the|in conclusion)[,:]? )*"
NOUN = r"(?:(?:the )?(?:continuation|option|passage|text|candidate|version) )?"
REMARK = r"is (?:the |clearly |slightly )*(?:better|best|winner|preferred)|wins|because|since"


def parse(kind, answer):
    """The judge's verdict (a key of VERDICTS[kind]) or None."""
    answer = own_words(answer or "")
    labels = {label: LABELS[label] for label in VERDICTS[kind]}
    if answer.endswith("}") and (label := from_json(answer, labels)):
        return label
    if kind == "factuality" and (label := from_broken_json(answer, labels)):
        return label
    last = answer.rsplit("\n", 1)[-1]
    if last.count('"') % 2 or last.count("“") != last.count("”"):
        return None  # the end of a quotation that began in another line: not the judge's word
    return from_line(last, labels)


def own_words(answer):
    """The end of the answer in plain characters, without reasoning blocks, fences and end marks."""
    answer = re.sub("[\u200b-\u200d\ufeff]", "", unicodedata.normalize("NFKC", answer))
    answer = re.split(r"</think(?:ing)?>|<\|message\|>", answer)[-1]
    if re.match(r"\s*<think(?:ing)?>", answer):
        return ""  # the reasoning never ended
    lines = (line.strip() for line in answer[-20_000:].splitlines())
    answer = "\n".join(line for line in lines if line)
    answer = re.sub(rf"<({KEY})>\s*", r"\n\1: ", answer, flags=re.I)
    closer = re.compile(r"\s*(?:<\|\w+\|>|</\w+>|<end_of_turn>|```|~~~|---+|\*\*\*+)\s*$")
    while (shorter := closer.sub("", answer[-100:])) != answer[-100:]:
        answer = answer[:-100] + shorter
    return answer


def which(text, labels, noun=""):
    """The label that the whole text is, but for marks around it, or None."""
    text = re.sub(r"^[\W_]+|[\W_]+$", "", re.sub(r"[*`\"'\s]+", " ", text))
    found = [k for k, how in labels.items() if re.fullmatch(f"{noun}(?:{how})", text, re.I)]
    return found[0] if found else None


def from_json(answer, labels):
    """A JSON object that ends the answer, whatever stands before it."""
    for brace in list(re.finditer(r"\{", answer))[:50]:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(answer, brace.start())
        except (ValueError, RecursionError):
            continue
        if end == len(answer) and isinstance(value, dict):
            said = [v for k, v in value.items() if re.fullmatch(KEY, k.strip(), re.I)]
            alone = len(said) == 1 and isinstance(said[0], str)
            return which(said[0], labels, NOUN) if alone else None
    return None


def from_broken_json(answer, labels):
    """{"reasoning": ..., "label": ...} with unescaped or single quotes, or no closing brace. The
    label must be the last thing said, or the first of an object that speaks of no other label."""
    pair = rf"[\"'`]?label[\"'`]?\s*[:=]\s*[\"'`]?({'|'.join(labels.values())})[\"'`]?\s*"
    if last := re.search(rf"[{{,\n]\s*{pair},?\s*\}}?$", answer, re.I):
        return which(last[1], labels)
    first = re.match(rf"(?:```\w*)?\s*\{{\s*{pair},\s*[\"'`]?reasoning\b", answer, re.I)
    alone = len(re.findall(r"\blabel\b", answer, re.I)) == 1
    return which(first[1], labels) if first and alone else None


def from_line(line, labels):
    """`VERDICT: A`, alone on the last line or after a full stop; a remark may follow."""
    line = re.sub(r"\\(?:boxed|text\w*|math\w+)\b|__|[*`#$\[\]{}【】]", "", line)
    line = re.sub(r"\s+", " ", line).strip()
    if len(line) < 30 and not line.endswith(":") and (label := which(line, labels)):
        return label  # nothing but the label
    any_label = f"(?:{'|'.join(sorted(labels.values(), key=len, reverse=True))})"
    start = rf"(?:^[\"']?|^[-•] |(?<=[.!?)]) ){LEAD}{KEY}(?: is)?(?: ?[:=–—>→-]+)? ?"
    again = rf"(?:{LEAD}{KEY} ?: ?)?[\"'(]?{NOUN}"
    found = list(re.finditer(rf"{start}{again}({any_label})(?![\w/|&])", line, re.I))
    if not found or len(re.findall(rf"\b{KEY}\W*{any_label}\b", line, re.I)) > len(found):
        return None
    if line[: found[-1].start()].count('"') % 2:
        return None  # within a quotation
    rest = line[found[-1].end() :].strip("\"') ")
    other = rf"[\s.,;:(—–-]*(?:(?:or|and)\b|{any_label}\W*$)"
    remark = rf"\W*$|(?!{other})(?:[.,;:(—–-]|(?:{REMARK})\b)"
    return which(found[-1][1], labels) if re.match(remark, rest, re.I) else None


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
class Pool:
    """One prefix, the distinct texts that continue it, and what was asked about them."""

    prefix: str
    reference: str
    texts: list
    pivot: int  # the text with which the pivot schedule compares all others
    key: int  # global sample number
    tally: Counter = field(default_factory=Counter)
    verdicts: list = field(default_factory=list)


class Judge:
    """Rewards: kinds with optional weights ("quality,safety:2"). comparisons: "all", "pivot",
    "race", or R opponents a candidate (schedules.py). samples: how often each question is asked;
    pairs alternate their order. retries: how often an answer without a readable verdict is asked
    again, with a fresh seed, before the verdict is absent. store: SQLite file that keeps pools."""

    def __init__(
        self,
        chat,
        *,
        rewards=("quality", "safety"),
        comparisons="all",
        samples=1,
        temperature=1.0,
        top_p=1.0,
        max_tokens=512,
        prompts="prompts",
        retries=3,
        seed=0,
        store=None,
    ):
        self.chat, self.comparisons, self.samples = chat, comparisons, samples
        self.weights, self.prompts = parse_rewards(rewards), load_prompts(prompts)
        self.sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        self.retries, self.seed, self.store = retries, seed, store
        self.open = asyncio.Semaphore(OPEN)
        self.tally = Counter()  # of questions asked one by one, through `verdict`

    def small_question(self):
        """One that any judge can answer, for `chat.greet`."""
        return render(self.prompts["safety"], text="The sun is out.")

    def score(self, step, prefixes, references, candidates, sources, index):
        """Rewards of candidates[b][c] (None: a failed rewrite) as a Future of Scores. `sources`
        names the C candidates; `index` are the global sample numbers that key all chance."""
        return self.chat.run(self._score(step, prefixes, references, candidates, sources, index))

    async def _score(self, step, prefixes, references, candidates, sources, index):
        rows = list(zip(prefixes, references, candidates, index, strict=True))
        pools = [new_pool(*row, sources) for row in rows]
        worth = await together(self._pool(pool) for pool in pools)  # kind -> text -> value
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
            await asyncio.to_thread(keep_pools, self.store, step, sources, rows, reward)
        tally = sum((pool.tally for pool in pools), Counter())
        counts = (tally["calls"], tally["failed"], tally["absent"])
        first = pools[0].verdicts if pools else []
        examples = sorted(first, key=lambda seen: (seen["kind"], seen["candidates"]))
        return Scores(reward, by_kind, *counts, examples)

    async def _pool(self, pool):
        """kind -> text -> value between 0 and 1, nan without a verdict."""
        kinds = [kind for kind in self.weights if kind != "quality"]
        pointwise = asyncio.ensure_future(together(self._pointwise(kind, pool) for kind in kinds))
        if "quality" in self.weights:
            kinds = ["quality", *kinds]
            quality, others = await together([self._compare(pool, pointwise), pointwise])
            worth = [quality, *others]
        else:
            worth = await pointwise
        return {
            kind: dict(zip(pool.texts, values, strict=True))
            for kind, values in zip(kinds, worth, strict=True)
        }

    async def _pointwise(self, kind, pool):
        return await together(self._mean(kind, pool, [i]) for i in range(len(pool.texts)))

    async def _compare(self, pool, pointwise):
        """Asks the schedule's rounds and returns its scores. A race waits for the other rewards."""
        bonus = np.zeros(len(pool.texts))
        if str(self.comparisons).startswith("race") and len(self.weights) > 1:
            weights = [weight for kind, weight in self.weights.items() if kind != "quality"]
            bonus = weights @ np.array(await pointwise) / self.weights["quality"]
        rng = np.random.default_rng([self.seed, pool.key])
        rounds = schedule(self.comparisons, len(pool.texts), pool.pivot, rng, bonus)
        outcomes, times = None, Counter()  # how often a pair was asked in this order before
        while True:
            try:
                pairs = rounds.send(outcomes)
            except StopIteration as done:
                return done.value
            asked = []
            for pair in pairs:
                asked.append(self._mean("quality", pool, pair, times[pair]))
                times[pair] += 1
            outcomes = await together(asked)

    async def _mean(self, kind, pool, shown, repeat=0):
        """Mean over the samples that have a verdict, nan without any."""
        numbers = range(repeat * self.samples, (repeat + 1) * self.samples)
        values = await together(self._sample(kind, pool, number, shown) for number in numbers)
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else np.nan

    async def _sample(self, kind, pool, sample, shown):
        """The value of the first (or only) candidate shown; odd samples swap the order."""
        swap = len(shown) == 2 and sample % self.samples % 2
        shown = [pool.texts[i] for i in (shown[::-1] if swap else shown)]
        names = ("a", "b") if len(shown) == 2 else ("text",)
        texts = dict(zip(names, shown, strict=True), prefix=pool.prefix, reference=pool.reference)
        label, answer = await self.verdict(kind, sample, pool.tally, **texts)
        pool.verdicts.append(dict(kind=kind, candidates=shown, verdict=label, answer=answer))
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
            for attempt in range(1 + self.retries):
                seed = question_seed(self.seed, question, sample, attempt)
                answer = await self.chat.ask(question, seed=seed, **how)
                tally["calls"] += 1
                if label := parse(kind, answer.text):
                    return label, answer.text
                tally["failed"] += 1
        tally["absent"] += 1
        return None, answer.text


def open_judge(chat, config: Config, store=None):
    """The judge of a config, asked through `chat`; store: `chat.store`, where pools are to be kept.

    UserError where config.prompts is no folder, or a prompt in it does not show what ours shows.
    """
    return Judge(
        chat,
        rewards=names(config.rewards),
        comparisons=config.comparisons,
        samples=config.judge_samples,
        temperature=config.judge_temperature,
        top_p=config.judge_top_p,
        max_tokens=config.judge_max_tokens,
        prompts=config.prompts,
        retries=config.judge_retries,
        seed=config.seed,
        store=store,
    )


def new_pool(prefix, reference, candidates, key, sources):
    """Equal texts are judged once and share their score; one without a word is 0 in every kind
    without asking, for it must never pay to say nothing."""
    texts = list(dict.fromkeys(text for text in candidates if text and text.strip()))
    suffix = dict(zip(sources, candidates, strict=True)).get("suffix")
    pivot = texts.index(suffix) if suffix in texts else 0
    return Pool(prefix, reference, texts, pivot, key)


async def together(coroutines):
    """asyncio.gather that leaves nothing running when one fails or the whole is cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# ---------------------------------------------------------------------------------------------
# Pools kept for replay

POOLS = """CREATE TABLE IF NOT EXISTS pools
    (step INTEGER, key INTEGER, pool BLOB, PRIMARY KEY (step, key)) WITHOUT ROWID"""


def keep_pools(store, step, sources, rows, rewards):
    """One compressed row a pool: [prefix, reference, candidates, sources, rewards]."""
    from chat import open_wal  # not at the top: importing this file stays light

    blobs = [
        (step, key, zlib.compress(json.dumps([prefix, reference, texts, sources, reward]).encode()))
        for (prefix, reference, texts, key), reward in zip(rows, rewards.tolist(), strict=True)
    ]
    with contextlib.closing(open_wal(store)) as db, db:
        db.execute(POOLS)
        db.executemany("INSERT OR REPLACE INTO pools VALUES (?, ?, ?)", blobs)
