"""The only file that speaks HTTP to a teacher: OpenAI-compatible chat completions, many at a time.

In: prompts (`Chat.ask`, a coroutine that runs on the client's own background thread through
`Chat.run`). Out: one `Answer` each. In between: at most `concurrency` requests in flight, spread
over one or several endpoints; time-outs, retries, rate limits; and an SQLite file of all answers,
so that no question whose answer has arrived is ever paid for again, whenever the process dies.

    chat = Chat("http://localhost:8000/v1", "my-judge", cache="judgments.sqlite")
    answer = chat.run(chat.ask("2 + 2?", seed=0, temperature=1, top_p=1, max_tokens=64)).result()

A failed request is never an answer: it is repeated, or the answer's text is None, or it raises
UserError (asking again cannot help) or TeacherGone (nobody has answered for a long time).

Why aiohttp: `requests` needs a thread for every request in flight, and the official client (on
httpx) spends about ten times the CPU per call (bench_chat.py), CPU that training wants.
"""

import asyncio
import collections
import concurrent.futures
import email.utils
import hashlib
import itertools
import json
import logging
import os
import random
import sqlite3
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

from support.command import UserError, wait

log = logging.getLogger(__name__)

MAX_BODY = 2 << 20  # bytes of a reply that we are willing to read
RETRY_STATUSES = {408, 409, 425, 429, *range(500, 600)}
SET_ASIDE = 10  # failures in a row after which an endpoint is only probed
SPREAD = 0.005  # seconds between two requests that leave after a pause, at first


class TeacherGone(Exception):
    """No endpoint has answered any question for `give_up_after` seconds."""


class Failure(Exception):
    """One attempt failed and may be repeated. `kind` is what the statistics count it under."""

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None):
        super().__init__(f"{kind} {detail}".strip())
        self.kind, self.retry_after = kind, retry_after


class Answer(NamedTuple):
    text: str | None  # None: no usable answer, and `finish` is the kind of failure
    finish: str  # the server's finish_reason
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False  # True: this ask cost nothing


class Endpoint:
    """A server's address, and when the next request may leave for it.

    Rate limited: all requests pause, then leave one by one, `gap` seconds apart. Every answer
    narrows the gap by one percent; a pause widens it if more than a fifth of the latest requests
    was refused, by as much as would have let the accepted ones through. Failing SET_ASIDE times in
    a row: one probe every `aside` seconds, longer and longer, until one succeeds. Failures of
    requests that left before the latest pause start no new one.
    """

    def __init__(self, url: str):
        if "@" in url or "?" in url:
            raise ValueError("a key goes into OPENAI_API_KEY, not into the teacher's URL")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"a teacher's URL looks like http://host:port/v1, not {url!r}")
        self.url = url.rstrip("/") + "/chat/completions"
        self.in_flight = 0
        self.failures = 0  # in a row
        self.turn = 0.0  # when the next request may leave
        self.gap = 0.0  # seconds between two departures
        self.refused = 0.0  # share of the latest fifty or so that met a rate limit
        self.aside = 0.0  # seconds between two probes; 0 = in use
        self.paused_at = 0.0

    def load(self) -> int:
        return (self.in_flight + 1) * (self.failures + 1)

    def depart(self, now: float) -> None:
        self.turn = now + max(self.gap, self.aside)

    def answered(self, now: float) -> None:
        if self.aside:  # it is back: let the waiting requests come, but not all at once
            self.aside, self.gap, self.turn = 0.0, SPREAD, now
        self.failures = 0
        self.refused *= 0.98
        self.gap = 0.99 * self.gap if self.gap > 1e-4 else 0.0

    def failed(self, failure: Failure, sent: float, now: float) -> None:
        limited = failure.kind == "429" or failure.retry_after is not None
        if limited:
            self.refused += 0.02 * (1.0 - self.refused)
            self.turn = max(self.turn, now + (failure.retry_after or 0.0))
        if sent < self.paused_at:
            return
        self.failures += 1
        if limited:
            pause = failure.retry_after or random.uniform(0.03, 0.06) * 2 ** min(self.failures, 9)
            widen = 1.0 / (1.0 - min(self.refused, 0.5)) if self.refused > 0.2 else 1.0
            self.gap = min(1.0, widen * (self.gap or SPREAD))
        elif self.failures >= SET_ASIDE:
            pause = self.aside = 2.0 ** min(self.failures - SET_ASIDE, 6)
            log.warning("%s set aside for %.0f s: %s", self.url, pause, failure)
        else:
            return
        self.paused_at, self.turn = now, max(self.turn, now + pause)


def retry_after(headers) -> float | None:
    """Seconds to wait by the Retry-After header: a number of seconds or an HTTP date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(seconds, 3600.0) if seconds > 0 else 0.0


def parse(content: bytes) -> Answer:
    """The answer in a chat completion's JSON; text None if there is nothing to use."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        raise Failure("invalid_json") from None
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, finish = choice["message"], str(choice.get("finish_reason") or "stop")
        text, reasoning = message.get("content"), message.get("reasoning_content")
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise Failure("malformed", content[:200].decode(errors="replace")) from None
    if not isinstance(text, str | None):
        raise Failure("malformed", "content is not a string")
    tokens = [n if isinstance(n, int) and 0 <= n < 1 << 31 else 0 for n in tokens]
    if finish in ("length", "content_filter"):
        text = None
    elif text is None or not text.strip():
        finish = "reasoning_only" if reasoning else "null" if text is None else "empty"
        text = None
    # lone surrogates are legal in JSON and nowhere else
    text, finish = (s and s.encode(errors="replace").decode() for s in (text, finish))
    return Answer(text, finish, *tokens)


async def read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """At most about `limit` bytes of the body; a connection left half read is closed by aiohttp."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            break
    return b"".join(chunks)


class Chat:
    """A client for one model on one or several endpoints, with its own thread and event loop."""

    def __init__(
        self,
        urls: str | list[str],
        model: str,
        *,
        concurrency: int = 1024,  # requests in flight, over all endpoints
        timeout: float = 120.0,  # seconds for one attempt
        retries: int = 12,  # repeats of a question while other questions are answered
        give_up_after: float = 600.0,  # seconds without any answer until TeacherGone
        cache: str | os.PathLike | None = None,  # SQLite file
    ):
        urls = urls.split(",") if isinstance(urls, str) else urls
        self.store = cache  # for `judge.open_judge`: pools are kept beside the answers
        self._endpoints = [Endpoint(url.strip()) for url in urls]
        self._model, self._retries, self._give_up_after = model, retries, give_up_after
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, 20.0))
        self._slots = asyncio.Semaphore(concurrency)
        self._waiting = 0  # requests waiting for their turn at an endpoint
        self._heard = 0.0  # when the last answer arrived (or the first question was asked)
        self._trouble = ""  # the last failure, for TeacherGone's message
        self._asking: dict[bytes, asyncio.Task] = {}
        self._counts = collections.Counter()
        self._failed = collections.Counter()
        self._latency = collections.deque(maxlen=2000)  # seconds, of the latest answers
        self._db = open_cache(cache) if cache else None
        self._rows, self._committed = [], None  # answers of the next commit, and its future

        self._closing = asyncio.Event()
        started = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="chat", daemon=True
        )
        self._thread.start()
        self._loop = started.result()

    async def _serve(self, started: concurrent.futures.Future) -> None:
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
            tasks = list(self._asking.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._db:
            self._commit()
            self._db.close()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, coroutine) -> concurrent.futures.Future:
        """Starts a coroutine on the background thread; call it from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancels what is in flight; every answer that has arrived is in the cache."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(timeout=2.0)

    def stats(self) -> dict:
        """Totals since the start; latencies in seconds, of the latest answers."""
        latency = sorted(self._latency) or [0.0]
        names = ("calls", "retries", "cached", "dropped", "tokens_in", "tokens_out")
        return {
            **{name: self._counts[name] for name in names},
            "failed": dict(self._failed),
            "latency_p50": latency[len(latency) // 2],
            "latency_p99": latency[int(len(latency) * 0.99)],
        }

    async def ask(
        self, prompt: str, *, seed: int, temperature: float, top_p: float, max_tokens: int
    ) -> Answer:
        """The answer to one question, from the cache if this very question was asked before."""
        request = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        body = json.dumps(request).encode()
        key = hashlib.sha256(body).digest()
        if key in self._asking:  # the same question is in flight: share its answer
            self._counts["cached"] += 1
            return (await asyncio.shield(self._asking[key]))._replace(cached=True)
        if self._db and (row := self._db.execute(SELECT, (key,)).fetchone()):
            self._counts["cached"] += 1
            return Answer(*row, cached=True)
        if not self._asking:
            self._heard = time.monotonic()
        task = self._asking[key] = asyncio.create_task(self._answer(key, body))
        task.add_done_callback(lambda _: self._asking.pop(key))
        # What it raises is heard by its caller, or by nobody where the caller has given up.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)  # a caller that gives up must not waste the answer

    async def _answer(self, key: bytes, body: bytes) -> Answer:
        """Attempts until one succeeds, the question is dropped, or the teacher is lost."""
        began = time.monotonic()
        for attempt in itertools.count():
            async with self._slots:
                endpoint = await self._turn()
                try:
                    answer = await self._attempt(endpoint, body)
                    break
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
        if answer.text is None:
            self._failed[answer.finish] += 1
        elif self._db:
            await self._store(key, answer)
        return answer

    def _patience(self) -> float:
        """Seconds left until the teacher counts as gone."""
        left = self._heard + self._give_up_after - time.monotonic()
        if left <= 0:
            raise TeacherGone(f"no answer for {self._give_up_after:.0f} s; {self._trouble}")
        return left

    async def _turn(self) -> Endpoint:
        """Waits until a request may leave, and says for where: the least-loaded open endpoint."""
        self._waiting += 1
        try:
            while True:
                now = time.monotonic()
                endpoint = min(self._endpoints, key=lambda e: (max(0.0, e.turn - now), e.load()))
                if endpoint.turn <= now:
                    endpoint.depart(now)
                    return endpoint
                spread = random.random() * endpoint.gap * self._waiting
                await asyncio.sleep(min(endpoint.turn - now + spread, 1.0, self._patience()))
        finally:
            self._waiting -= 1

    async def _attempt(self, endpoint: Endpoint, body: bytes) -> Answer:
        """One request. Raises Failure for what may pass, UserError for what will not."""
        self._counts["calls"] += 1
        endpoint.in_flight += 1
        sent = time.monotonic()
        try:
            async with self._session.post(
                endpoint.url, data=body, allow_redirects=False
            ) as response:
                answer = await self._receive(response, endpoint.url)
        except asyncio.TimeoutError:
            failure = Failure("timeout")
        except aiohttp.ClientPayloadError as error:
            failure = Failure("half_closed", str(error))
        except (aiohttp.ClientError, OSError) as error:
            failure = Failure("connection", str(error) or type(error).__name__)
        except Failure as error:
            failure = error
        else:
            self._heard = time.monotonic()
            endpoint.answered(self._heard)
            self._latency.append(self._heard - sent)
            self._counts["tokens_in"] += answer.prompt_tokens
            self._counts["tokens_out"] += answer.completion_tokens
            return answer
        finally:
            endpoint.in_flight -= 1
        self._failed[failure.kind] += 1
        self._trouble = f"{endpoint.url}: {failure}"
        endpoint.failed(failure, sent, time.monotonic())
        raise failure from None

    async def _receive(self, response: aiohttp.ClientResponse, url: str) -> Answer:
        """Reads a reply, of bounded size, and tells answers, failures and refusals apart."""
        status = response.status
        if status != 200:
            message = self._clean(await read(response, 4096))
            if status not in RETRY_STATUSES or "insufficient_quota" in message:
                hint = "" if status != 404 or "/v1/" in url else " (does the base URL lack /v1?)"
                raise UserError(f"{url} answered {status}: {message}{hint}")
            raise Failure(str(status), message, retry_after(response.headers))
        if "json" not in response.content_type:
            raise Failure("content_type", response.content_type)
        content = await read(response, MAX_BODY)
        if len(content) > MAX_BODY:
            raise Failure("too_large")
        return parse(content)

    def _clean(self, content: bytes) -> str:
        """An error body as one short printable line, without the key that it may repeat."""
        text = content.decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]

    async def _store(self, key: bytes, answer: Answer) -> None:
        """Returns once the answer is committed, together with all that arrived at the same time."""
        if not self._rows:
            loop = asyncio.get_running_loop()
            self._committed = loop.create_future()
            loop.call_soon(self._commit)
        self._rows.append((key, *answer[:4]))
        await self._committed

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        error = None
        try:
            with self._db:
                self._db.executemany(INSERT, rows)
        except sqlite3.Error as e:  # a full disk: whoever asked shall know
            error = e
        if not self._committed.done():
            self._committed.set_exception(error) if error else self._committed.set_result(None)


def greet(chat: Chat, question: str) -> None:
    """Asks a small question, so that a wrong URL, key or model name ends the run before it has
    trained anything; waits for a server that starts."""
    wait(chat.run(chat.ask(question, seed=0, temperature=0.0, top_p=1.0, max_tokens=16)))


class Traffic:
    """What several chats did, for the log; the first of them is the judge's."""

    def __init__(self, chats: list[Chat]):
        self.chats, self.seen = chats, collections.Counter()

    def since_last(self) -> dict[str, tuple[float, int]]:
        """Since the last call, as {name: (sum, count)}: requests, tokens, failures by kind, and
        the median and 99th percentile of recent answers in seconds."""
        stats = [chat.stats() for chat in self.chats]
        now = collections.Counter()
        for each in stats:
            now["requests"] += each["calls"]
            now["tokens_in"] += each["tokens_in"]
            now["tokens_out"] += each["tokens_out"]
            now.update({f"failed.{kind}": n for kind, n in each["failed"].items()})
        out = {f"judge.{name}": (float(now[name] - self.seen[name]), 0) for name in now}
        self.seen = now
        out["judge.tokens"] = (out["judge.tokens_in"][0] + out["judge.tokens_out"][0], 0)
        for name in ("latency_p50", "latency_p99"):
            out[f"judge.{name}"] = (stats[0][name], 1)
        return out


SELECT = "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?"
INSERT = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)"


def open_wal(path: str | os.PathLike, patience: float = 60.0) -> sqlite3.Connection:
    """A connection in WAL mode. SQLite waits for other processes itself, except while one of them
    switches the mode: then it says "locked" at once, and we wait."""
    db = sqlite3.connect(path, timeout=patience, check_same_thread=False)
    until = time.monotonic() + patience
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return db
        except sqlite3.OperationalError as e:
            if "locked" not in str(e) or time.monotonic() > until:
                db.close()
                raise
        time.sleep(0.05)


def open_cache(path: str | os.PathLike) -> sqlite3.Connection:
    """The answers' table. In WAL mode a commit survives kill -9, and costs no wait for the disk."""
    db = open_wal(path)
    db.execute("PRAGMA synchronous=NORMAL")
    with db:
        db.execute(
            "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, text TEXT, finish TEXT,"
            " prompt_tokens INTEGER, completion_tokens INTEGER)"
        )
    return db
