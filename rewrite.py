"""Rewriting: a better suffix for a prefix, from a teacher.

In: prefixes and their original suffixes (text). Out: rewritten suffixes that continue the prefix
directly, None where the teacher refused or gave no passage. `Teachers` opens the two of a run.
"""

import contextlib
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from config import Config
from judge import SPECIAL, Judge, defuse, load_prompts, question_seed, render, together
from support.chat import Chat, Traffic, greet
from support.distributed import agreement, rank
from support.settings import nested
from support.store import path_of

REFUSAL = re.compile(
    r"i(?:'m| am) (?:so |very )?(?:sorry|unable|not able)\b|sorry[.,!]|i apologi[sz]e"
    r"|as an? (?:ai|language model)|(?:unfortunately,? )?i (?:(?:must )?decline\b"
    r"|(?:can(?:no|')?t|can not|won't|will not) [^.!?\n]{0,60}?\b(?:rewrite|help|assist|comply"
    r"|provide|continue|fulfil|write|generate|produce|create|engage|do (?:that|this|so))\b)",
    re.I,
)
NO_CHANGE = re.compile(
    r"\W*(?:no (?:changes?|mending)(?: (?:is|are|was|were))?"
    r"(?: (?:needed|necessary|required|made))?|n/a|none|empty|unchanged)\W*$",
    re.I,
)
INTRODUCTION = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok)\b[^\n]{0,80}\n+)?"
    r"(?:\W*(?:(?:here(?:'s| is)|below is|this is)\b[^\n:.]{0,60}\b)?(?:(?:the )?(?:new|rewritten"
    r"|revised|corrected) )?(?:passage|text|version|rewrite)\b[^\n:.]{0,60}:\W*(?:\s|$))",
    re.I,
)
REMARK = re.compile(
    r"\n\W{0,40}(?:notes?|changes(?: made)?|explanation|comment)\W*:.*", re.I | re.S
)


class Rewriter:
    """Asks through `chat` as the config's keys say. A refusal in words, an empty or a cut answer is
    asked again `retries` times, with a fresh seed; what the server refuses is not."""

    def __init__(self, chat, config: Config | None = None, retries: int = 1):
        c = config or Config()
        self.chat, self.seed, self.retries = chat, c.seed, retries
        self.sampling = dict(temperature=c.rewrite_temperature, top_p=1.0)
        self.sampling["max_tokens"] = c.rewrite_max_tokens or 4 * c.chunk
        self.template = load_prompts(c.prompts)["rewrite"]

    def rewrite(self, prefixes, suffixes, index):
        """Future of a list of texts or None. `index`: global sample numbers that key all chance."""
        rows = zip(prefixes, suffixes, index, strict=True)
        return self.chat.run(together(self._one(*row) for row in rows))

    async def _one(self, prefix, suffix, key):
        last_words = last_five_words(prefix)
        question = render(self.template, prefix=prefix, original=suffix, last_words=last_words)
        for attempt in range(1 + self.retries):
            seed = question_seed(self.seed, question, key, attempt)
            answer = await self.chat.ask(question, seed=seed, **self.sampling)
            if passage := clean(answer.text, prefix, suffix):
                return passage
            if answer.text is None and answer.refused:
                break
        return None


class Teachers:
    """Who judges and who rewrites in a run; world: the teacher, for a Chat, that "world" names."""

    def __init__(self, config: Config, world: Callable, stack: contextlib.ExitStack):
        self.run, self.config, self.world, self.stack = Path(config.out_dir), config, world, stack
        judge = self.open(config.judge_url, config.judge_model, config.judge_extra)
        rewriter = self.open(config.rewrite_url, config.rewrite_model, config.rewrite_extra)
        chats = [judge, rewriter]
        self.judge = self.examiner = Judge(judge, config, judge.store)
        self.rewriter = Rewriter(rewriter, config)
        c = config
        if c.eval_judge_url or c.eval_judge_model or c.eval_judge_extra:
            # A record of its own: the same question to another judge is another question.
            asked = c.eval_judge_url or c.judge_url, c.eval_judge_model or c.judge_model
            chats.append(self.open(*asked, c.eval_judge_extra, "evaluation.sqlite"))
            self.examiner = Judge(chats[-1], config)
        self.traffic = Traffic(chats).since_last
        with agreement():
            if rank() == 0:  # a wrong URL, key or model is known before anything is trained
                question = self.judge.small_question()
                for chat in (chat for chat in chats if chat.urls):
                    greet(chat, question)

    def open(self, url: str, model: str, extra: str, record: str = "judgments.sqlite") -> Chat:
        c, teacher = self.config, self.world if url == "world" else url
        how: dict = dict(concurrency=c.concurrency, timeout=c.timeout, extra=nested(extra))
        cache = path_of(self.run / record, rank())
        return self.stack.enter_context(
            Chat(teacher, model, cache=cache, give_up_after=c.give_up_after, **how)
        )

    def score(self, step: int, pool) -> Future:
        """Future of judge.Scores of a candidates.Pool."""
        batch = pool.batch
        texts = batch.prefix_text, batch.suffix_text, pool.texts
        return self.judge.score(step, *texts, pool.sources, batch.index.tolist())


def last_five_words(prefix):
    """With the white space that ends the prefix, so that any suffix fits right behind them."""
    return " ".join(prefix.split()[-5:]) + prefix[len(prefix.rstrip()) :]


def clean(answer, prefix, suffix):
    """The passage alone, behind the white space that the suffix starts with; None without one."""
    passage = re.split(r"</think(?:ing)?>|<\|message\|>", answer or "")[-1].strip()
    passage = INTRODUCTION.sub("", passage, count=1) if not INTRODUCTION.match(suffix) else passage
    passage = re.sub(r"</?(?:original|prefix|passage|rewrite)(?: \w+)?>", "", passage).strip()
    if fenced := re.fullmatch(r"```\w*\n(.*?)\n?```", passage, re.S):
        passage = fenced[1].strip()
    passage = passage if REMARK.search(suffix) else REMARK.sub("", passage).strip()
    if re.fullmatch('["“][^"“”]*["”]', passage) and suffix.strip()[:1] not in "\"“'":
        passage = passage[1:-1].strip()
    passage = without_echo(passage, prefix, suffix)
    if passage.startswith("<think") or not re.search(r"\w", passage) or NO_CHANGE.match(passage):
        return None
    refuses, refused = (REFUSAL.match(text.replace("’", "'").strip()) for text in (passage, suffix))
    if refuses and not refused:
        return None
    if SPECIAL.search(suffix):  # give the special tokens it spells back as they were
        for token in set(re.findall(r"\S+", suffix)):
            passage = passage.replace(defuse(token), token)
    space = suffix[: len(suffix) - len(suffix.lstrip())]
    return space + passage


def without_echo(passage, prefix, suffix):
    """Drops what the passage repeats of the prefix's last five words, however spaced; and, where
    the prefix ends within a word, the part of that word which the prefix already holds."""
    words = prefix.split()[-5:]
    echo = r"(?:\.\.\.|…)?\s*" + r"\s+".join(re.escape(word) for word in words)
    if echoed := words and re.match(echo, passage, re.I):
        return passage[echoed.end() :].lstrip()
    within_word = prefix[-1:].isalnum() and suffix[:1].isalnum()
    if within_word and passage.lower().startswith(words[-1].lower()):
        return passage[len(words[-1]) :]
    return passage
