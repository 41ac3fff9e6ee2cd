"""The only file that asks a teacher: OpenAI-compatible chat completions over HTTP, many at a time.

In: prompts (`Chat.ask`, a coroutine that runs on the client's own background thread through
`Chat.run`). Out: one `Answer` each. In between: at most `concurrency` requests in flight, spread
over one or several endpoints; time-outs, retries, rate limits; and an SQLite file of all answers,
so that no question whose answer has arrived is ever paid for again, whenever the process dies.

    with Chat("http://localhost:8000/v1", "my-judge", cache="judgments.sqlite") as chat:
        how = dict(seed=0, temperature=1, top_p=1, max_tokens=64)
        answer = chat.run(chat.ask("2 + 2?", **how)).result()

A failed request is never an answer. What may pass is asked again. What the server will not answer
because of its content (a filter, a prompt that is too long) is an absent answer, text None. What is
wrong with us (the key, the model, the URL), or has become the rule, raises UserError; nobody
answering for a long time raises TeacherGone.

Why aiohttp: `requests` needs a thread for every request in flight, and the official client (on
httpx) spends about ten times the CPU per call, CPU that training wants.
"""

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path

import aiohttp

from support.command import Stopped, UserError, wait
from support.endpoint import (
    WHOLE,
    Answer,
    Endpoint,
    Failure,
    Refused,
    Resend,
    error_in,
    read_reply,
    refusal,
)
from support.store import Store

log = logging.getLogger(__name__)

COUNTS = ("calls", "retries", "cached", "dropped", "tokens_in", "tokens_out")
RECENT = 1000  # of the latest so many questions, from 20 on, half may be refused

# A question that was refused has a row, too: its text is NULL, its finish the kind of refusal.
ANSWERS = """answers (key BLOB PRIMARY KEY, text TEXT, finish TEXT, prompt_tokens INTEGER,
    completion_tokens INTEGER)"""
SELECT = "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?"
INSERT = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)"


class TeacherGone(Stopped):
    """No endpoint has answered any question for `give_up_after` seconds."""


class Chat(contextlib.AbstractContextManager):
    """A client for one model on one or several endpoints, with its own thread and event loop."""

    def __init__(
        self,
        teacher: str | Callable[[dict], Awaitable[dict]],  # URLs with commas; or what answers here
        model: str,
        *,
        extra: dict | None = None,  # fields added to every request, or in place of ours
        concurrency: int = 1024,  # requests in flight, over all endpoints
        timeout: float = 120.0,  # seconds for one attempt
        retries: int = 12,  # repeats of a question while other questions are answered
        give_up_after: float = 600.0,  # seconds without any answer until TeacherGone
        cache: str | os.PathLike | None = None,  # SQLite file
    ):
        self._here = None if isinstance(teacher, str) else teacher  # a request -> its reply
        self.urls = [url.strip() for url in teacher.split(",")] if isinstance(teacher, str) else []
        self._endpoints = [Endpoint(url) for url in self.urls]
        self.store = Store(Path(cache)) if cache else None
        if self.store:
            self.store.create(ANSWERS)
        self._model, self._extra = model, extra or {}
        self._retries, self._give_up_after = retries, give_up_after
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, 20.0))
        self._slots = asyncio.Semaphore(concurrency)
        self._waiting = 0  # requests waiting for their turn at an endpoint
        self._heard = 0.0  # when the last answer arrived (or the first question was asked)
        self._trouble = ""  # the last failure, for TeacherGone's message
        self._asking: dict[bytes, asyncio.Task] = {}
        self._counts: Counter = Counter()
        self._failed: Counter = Counter()
        self._latency: deque = deque(maxlen=2000)  # seconds, of the latest answers
        self._recent: deque = deque(maxlen=RECENT)  # of the latest questions: was it refused?
        self.refusal = ""  # the latest refused question, in the server's words

        gc.freeze()  # or each collection among thousands of questions walks through all of torch
        self._closing = asyncio.Event()
        started: Future = Future()
        life = self._serve(started)
        self._thread = threading.Thread(target=asyncio.run, args=(life,), name="chat", daemon=True)
        self._thread.start()
        self._loop = started.result()

    async def _serve(self, started: Future) -> None:
        """The background thread's life: a session that is open until `close` is called."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=self._timeout,
            auto_decompress=False,
        ) as self._session:
            started.set_result(asyncio.get_running_loop())
            await self._closing.wait()
            for task in (tasks := list(self._asking.values())):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self.store:
            self.store.close()

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, coroutine) -> Future:
        """Starts a coroutine on the background thread; call it from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancels what is in flight; every answer that has arrived is in the cache."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(timeout=2.0)
        gc.unfreeze()

    def stats(self) -> dict:
        """Totals since the start; latencies in seconds, of the latest answers."""
        latency = sorted(self._latency) or [0.0]
        p50, p99 = latency[len(latency) // 2], latency[int(len(latency) * 0.99)]
        totals = {name: self._counts[name] for name in COUNTS} | {"failed": dict(self._failed)}
        return totals | {"latency_p50": p50, "latency_p99": p99}

    async def ask(
        self, prompt: str, *, seed: int, temperature: float, top_p: float, max_tokens: int
    ) -> Answer:
        """The answer to one question, from the cache if this very question was asked before."""
        how = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
        request = dict(model=self._model, messages=[dict(role="user", content=prompt)], **how)
        request |= self._extra  # what a server's dialect changes is no part of the key
        key = hashlib.sha256(json.dumps(request).encode()).digest()
        if key in self._asking:  # the same question is in flight: share its answer
            self._counts["cached"] += 1
            return (await asyncio.shield(self._asking[key]))._replace(cached=True)
        row = self.store.find(SELECT, key) if self.store else None
        if row and row[1].lower() in WHOLE:  # earlier versions kept broken answers, too
            self._counts["cached"] += 1
            return Answer._make((*row, True, False))
        if not self._asking:
            self._heard = time.monotonic()
        # A refusal that an earlier process met is no news.
        task = self._asking[key] = asyncio.create_task(self._answer(key, request, news=row is None))
        task.add_done_callback(lambda _: self._asking.pop(key))
        # What it raises is heard by its caller, or by nobody where the caller has given up.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)  # a caller that gives up must not waste the answer

    async def _answer(self, key: bytes, request: dict, news: bool) -> Answer:
        """Attempts until one succeeds, the question is dropped, or the teacher is lost."""
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                async with self._slots:
                    if self._here:
                        answer = await self._attempt_here(self._here(request))
                    else:
                        answer = await self._attempt(await self._turn(), request)
                break
            except Resend:
                self._counts["retries"] += 1
                continue
            except Refused as refused:
                return await self._refused(key, refused.kind, refused.told, news)
            except Failure as failure:
                kind = failure.kind
            if attempt >= self._retries and self._heard > began:
                self._counts["dropped"] += 1
                return Answer(None, kind, 0, 0)
            # A server that answered just now is well, and a step waits for its last answer.
            longest = 1.0 if time.monotonic() - self._heard < 5.0 else 8.0
            backoff = random.uniform(0, min(longest, 0.25 * 2 ** min(attempt, 6)))
            await asyncio.sleep(min(backoff, self._patience()))
            self._counts["retries"] += 1
        self._recent.append(False)
        if answer.text is None:
            of = self.urls[0] if self.urls else "the teacher"
            self._count(answer.finish, f"an answer of {of} ended by {answer.finish!r}")
        elif self.store:
            await self.store.add(INSERT, (key, *answer[:4]))
        return answer

    async def _refused(self, key: bytes, kind: str, told: str, news: bool) -> Answer:
        """An absent answer. UserError where refusals are the rule: then it is not the question.

        A run that goes on asks what was refused once more, one question after another, for all
        others of that step are in its store; so those are not counted again.
        """
        self._count(kind, told)
        self.refusal = told
        if news:
            self._recent.append(True)
            if self.store:
                await self.store.add(INSERT, (key, None, kind, 0, 0))
        # Refusals come back sooner than answers: those in flight count as answered.
        bad, asked = sum(self._recent), len(self._recent)
        if asked >= 20 and 2 * bad > asked + sum(e.in_flight for e in self._endpoints):
            raise UserError(f"{bad} of the last {asked} questions were refused: {told}")
        return Answer(None, kind, 0, 0, refused=True)

    def _count(self, kind: str, told: str) -> None:
        """An absent answer; the first of a kind is told, but for those that every judge gives."""
        self._failed[kind] += 1
        if self._failed[kind] == 1 and kind not in ("length", "null", "empty", "reasoning_only"):
            log.warning("%s; it counts as no answer, and so do all of its kind", told)

    def _patience(self) -> float:
        """Seconds left until the teacher counts as gone."""
        left = self._heard + self._give_up_after - time.monotonic()
        if left <= 0:
            raise TeacherGone(f"no answer for {self._give_up_after:.0f} s: {self._trouble}")
        return left

    async def _turn(self) -> Endpoint:
        """Waits until a request may leave, and says for where: the least-loaded open endpoint."""

        def load(e: Endpoint):
            return max(0.0, e.turn - time.monotonic()), (e.in_flight + 1) * (e.failures + 1)

        self._waiting += 1
        try:
            while (endpoint := min(self._endpoints, key=load)).turn > (now := time.monotonic()):
                spread = random.random() * endpoint.gap * self._waiting
                await asyncio.sleep(min(endpoint.turn - now + spread, 1.0, self._patience()))
        finally:
            self._waiting -= 1
        endpoint.turn = time.monotonic() + max(endpoint.gap, endpoint.aside)
        return endpoint

    async def _attempt(self, endpoint: Endpoint, request: dict) -> Answer:
        """One request, and what its end says of the endpoint."""
        self._counts["calls"] += 1
        endpoint.in_flight += 1
        left = time.monotonic()
        try:
            answer = await endpoint.post(self._session, request, self._extra, self._key)
        except Failure as failure:
            self._failed[failure.kind] += 1
            self._trouble = f"{endpoint.base}: {failure.why}"
            endpoint.failed(failure, left, time.monotonic(), self._patience())
            raise
        except (Refused, Resend):
            self._well(endpoint)
            raise
        finally:
            endpoint.in_flight -= 1
        self._well(endpoint)
        return self._counted(answer, left)

    async def _attempt_here(self, answering: Awaitable[dict]) -> Answer:
        """As _attempt, where a function is the teacher: a pure one needs no server."""
        self._counts["calls"] += 1
        left = time.monotonic()
        reply = await answering
        self._heard = time.monotonic()
        if error := error_in(reply):
            raise refusal(error, json.dumps(reply), "the teacher", self._key, {})
        return self._counted(read_reply(reply), left)

    def _counted(self, answer: Answer, left: float) -> Answer:
        self._latency.append(self._heard - left)
        self._counts["tokens_in"] += answer.prompt_tokens
        self._counts["tokens_out"] += answer.completion_tokens
        return answer

    def _well(self, endpoint: Endpoint) -> None:
        """The endpoint has answered."""
        self._heard = time.monotonic()
        endpoint.answered(self._heard)

    async def unsure(self) -> None:
        """Says which servers may sample in ways of their own."""
        for endpoint in self._endpoints:
            await endpoint.recognise(self._session)
            endpoint.say_if_unsure(self._extra)


def greet(chat: Chat, question: str) -> None:
    """Asks a small question of each server, so that a wrong URL, key or model name ends the run
    before it has trained anything; waits for one that starts; says what can't be made sure."""
    how: dict = dict(temperature=1.0, top_p=1.0, max_tokens=16)
    asked = [chat.run(chat.ask(question, seed=n, **how)) for n in range(len(chat.urls))]
    if any([wait(answer).refused for answer in asked]):
        raise UserError(chat.refusal)
    wait(chat.run(chat.unsure()))


class Traffic:
    """What several chats did, for the log; the first of them is the judge's."""

    def __init__(self, chats: list[Chat]):
        self.chats, self.seen = chats, Counter()

    def since_last(self) -> dict[str, tuple[float, int]]:
        """Since the last call, as {name: (sum, count)}: requests, tokens, failures by kind, and
        the median and 99th percentile of recent answers in seconds."""
        stats, now = [chat.stats() for chat in self.chats], Counter()
        for each in stats:
            now.update(requests=each["calls"])
            now.update({name: each[name] for name in ("tokens_in", "tokens_out")})
            now.update({f"failed.{kind}": n for kind, n in each["failed"].items()})
        out = {f"judge.{name}": (float(now[name] - self.seen[name]), 0) for name in now}
        self.seen = now
        out["judge.tokens"] = (out["judge.tokens_in"][0] + out["judge.tokens_out"][0], 0)
        return out | {f"judge.{p}": (stats[0][p], 1) for p in ("latency_p50", "latency_p99")}
