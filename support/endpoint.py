"""A chat server as its client sees it: its address, its pace, its dialect, what its replies mean.

In: the URL of an OpenAI-compatible server, and requests. Out: an `Endpoint`, which says when the
next request may leave, and sends it in the server's words; an `Answer`, whose text is None where a
reply is none; `Failure` for what asking again may mend, `Refused` for what the question's content
forbids, UserError for what is wrong with us.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import random
import re
import socket
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from requests.utils import get_environ_proxies, select_proxy

from support.command import UserError

log = logging.getLogger(__name__)

SET_ASIDE = 10  # failures in a row after which an endpoint is only probed
SPREAD = 0.005  # seconds between two requests that leave after a pause, at first
MAX_BODY = 2 << 20  # bytes of a reply that we are willing to read
SILENT: set[str] = set()  # base URLs whose silence was told, by whichever client of the process
RETRY_STATUSES = {408, 409, 425, 429, *range(500, 600)}


class Failure(Exception):
    """One attempt failed and may be repeated. `kind` is what the statistics count it under, `why`
    what is told, in plain words."""

    def __init__(self, kind: str, why: str, retry_after: float | None = None):
        super().__init__(kind, why)
        self.kind, self.why, self.retry_after = kind, why, retry_after


class Refused(Exception):
    """The server will not answer this question, because of what is in it."""

    def __init__(self, kind: str, told: str):
        super().__init__(kind, told)
        self.kind, self.told = kind, told


class Resend(Exception):
    """The server does not take a field of the request, which it will not see again."""


# Sampling that a server does unless a request says otherwise, made to do nothing. By the owner that
# its list of models names: vLLM and SGLang go by the model's generation_config.json, llama.cpp and
# llama-cpp-python ("me") by defaults of their own; teachers/serve.py and the pocket world do none.
NEUTRAL: dict[str, dict] = {
    **dict.fromkeys(("vllm", "sglang"), dict(top_k=-1, min_p=0.0, repetition_penalty=1.0)),
    **dict.fromkeys(("llamacpp", "me"), dict(top_k=0, min_p=0.0, repeat_penalty=1.0)),
    "nanosip": {},
}
SHAPING = {name for values in NEUTRAL.values() for name in values}
PLAIN = re.compile(r"(?:.+\.)?(?:openai\.com|openai\.azure\.com|mistral\.ai)")  # hosts that do none
# What a field is called by a server that does not take it: OpenAI's reasoning models, Mistral.
NEWER = {"max_tokens": "max_completion_tokens", "seed": "random_seed"}


class Endpoint:
    """A server's address, when the next request may leave for it, in which words, and what it says.

    Rate limited: all requests pause, then leave one by one, `gap` seconds apart. Every answer
    narrows the gap by 2 %, every pause widens it by half, so that about one request in twenty is
    refused. Failing SET_ASIDE times in a row: one probe every `aside` seconds, longer and longer,
    until one succeeds. Failures of requests that left before the latest pause start no new one.
    """

    def __init__(self, url: str):
        if "@" in url or "?" in url:
            raise UserError("a teacher's URL ends at /v1; a key goes into OPENAI_API_KEY")
        try:
            host = urlsplit(url).hostname or ""
            good = urlsplit(url).port != 0 and re.match(r"https?://[^/:]\S*$", url)
            host.encode("idna")  # two dots in a row
        except ValueError:  # a port that is no number, half a bracket
            good = False
        if not good:
            raise UserError(f"a teacher's URL looks like http://host:port/v1, not {url!r}")
        self.base = url.rstrip("/")
        # What is sent beside the request; None: the server has not been asked who made it.
        self.neutral: dict | None = {} if PLAIN.fullmatch(host) else None
        self.probe: asyncio.Task | None = None
        self.unknown = False  # so that it may sample in ways of its own
        self.names: dict[str, str] = {}  # what it calls a field; empty: it does not take it
        self.url = self.base + "/chat/completions"
        self.proxy = proxy_of(self.url)
        self.in_flight = 0
        self.failing_since = 0.0  # when it began to fail; 0 = it does not
        self.told = False  # that it does not answer
        self.failures = 0  # in a row
        self.turn = 0.0  # when the next request may leave
        self.gap = 0.0  # seconds between two departures
        self.aside = 0.0  # seconds between two probes; 0 = in use
        self.paused_at = 0.0

    async def recognise(self, session: aiohttp.ClientSession) -> None:
        """Asks the server who made it, before its first question; all who wait share that."""

        async def ask():
            how = dict(timeout=aiohttp.ClientTimeout(total=5.0), allow_redirects=False)
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                async with session.get(f"{self.base}/models", proxy=self.proxy, **how) as response:
                    if response.status < 500:  # else it may be about to start
                        self.meet(await read_body(response))

        if self.neutral is None:
            if self.probe is None or self.probe.done():
                self.probe = asyncio.create_task(ask())
            await asyncio.wait([self.probe])

    def meet(self, models: bytes) -> None:
        """Recognises the server by its list of models; none: it has answered, but not that."""
        owner = ""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            owner = str(json.loads(models)["data"][0]["owned_by"])
        self.unknown, self.neutral = owner not in NEUTRAL, NEUTRAL.get(owner, {})

    def say_if_unsure(self, extra: dict) -> None:
        """What it may do to the answers, but for fields that are added to each request."""
        if self.unknown and not SHAPING & extra.keys():
            its_own = "a top_k, min_p or repetition penalty of its own"
            say_once(f"{self.base} may sample with {its_own}: docs/judging.md, Servers")

    def fields(self, request: dict) -> dict:
        """The request in the server's words; a value of None leaves its field out."""
        whole = (self.neutral or {}) | request
        whole = {name: value for name, value in whole.items() if NEWER.get(name) not in request}
        named = {self.names.get(name, name): value for name, value in whole.items()}
        return {name: value for name, value in named.items() if name and value is not None}

    def forget(self, name: str, model: str) -> None:
        """From now on the field goes by its newer name, or not at all."""
        first = next((old for old, new in self.names.items() if new == name), name)
        self.names[first] = newer = NEWER.get(name, "")
        instead = f"it is sent as {newer}" if newer else "it is left out"
        say_once(f"{self.base}: {model} does not take {name}: {instead}")

    async def post(
        self, session: aiohttp.ClientSession, request: dict, extra: dict, key: str
    ) -> "Answer":
        """One request. Failure for what may pass, Refused for what is about this question alone,
        Resend for a field that is not taken, UserError for what will never be answered.
        extra: fields that are never left out; key: what is not shown."""
        await self.recognise(session)
        sent, how = self.fields(request), dict(allow_redirects=False, proxy=self.proxy)
        try:
            async with session.post(self.url, data=json.dumps(sent).encode(), **how) as response:
                content = await read_body(response)
        except asyncio.TimeoutError:
            raise Failure("timeout", f"it takes longer than {session.timeout.total:g} s") from None
        except (aiohttp.ClientError, OSError) as broken:
            half = isinstance(broken, aiohttp.ClientPayloadError)
            raise Failure("half_closed" if half else "connection", in_words(broken)) from None
        reply = read_json(response.content_type, content) if response.status == 200 else None
        error = error_in(reply) if response.status == 200 else response.status
        if not error:
            return read_reply(reply)
        told = content[:4096].decode(errors="replace")
        ours = [name for name in sent if name not in {"model", "messages", *extra}]
        if name := untaken(error, told, reversed(ours)):
            if name in self.fields(request):  # else others have met with it meanwhile
                self.forget(name, request["model"])
            raise Resend
        raise refusal(error, told, self.url, key, response.headers)

    def answered(self, now: float) -> None:
        if self.neutral is None:
            self.meet(b"")
        if self.told and self.base in SILENT:
            SILENT.remove(self.base)
            log.warning("%s answers again", self.base)
        self.told = False
        if self.aside:  # it is back: let the waiting requests come, but not all at once
            self.aside, self.gap, self.turn = 0.0, SPREAD, now
        self.failures, self.failing_since = 0, 0.0
        self.gap = 0.98 * self.gap if self.gap > 1e-4 else 0.0

    def failed(self, failure: Failure, sent: float, now: float, patience: float) -> None:
        """sent: when that request left; patience: seconds for which it is waited for."""
        self.pace(failure, sent, now)
        quiet = now - self.failing_since < (30.0 if failure.retry_after else 1.0)
        if self.told or quiet and not self.aside:
            return
        self.told = True
        if self.base not in SILENT:  # one line, however often and by however many it is asked
            SILENT.add(self.base)
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + patience))
            told = "%s does not answer: %s; waiting until %s for an answer"
            log.warning(told, self.base, failure.why, until)

    def pace(self, failure: Failure, sent: float, now: float) -> None:
        """When the next request may leave, after a failure."""
        self.failing_since = self.failing_since or now
        pause = failure.retry_after or 0.0
        self.turn = max(self.turn, now + pause)
        if sent < self.paused_at:
            return
        self.failures += 1
        if failure.kind == "429" or failure.retry_after is not None:
            pause = pause or random.uniform(0.03, 0.06) * 2 ** min(self.failures, 9)
            self.gap = min(1.0, 1.5 * self.gap or SPREAD)
        elif self.failures >= SET_ASIDE:
            pause = self.aside = 2.0 ** min(self.failures - SET_ASIDE, 6)
        else:
            return
        self.paused_at, self.turn = now, max(self.turn, now + pause)


@functools.cache
def say_once(line: str) -> None:
    log.warning(line)


def proxy_of(url: str) -> str | None:
    """The proxy that http_proxy, https_proxy, all_proxy and no_proxy name, read as for the data;
    none for this machine itself."""
    if re.fullmatch(r"(.+\.)?localhost|127(\.\d+){3}|::1", urlsplit(url).hostname or ""):
        return None
    proxy = select_proxy(url, get_environ_proxies(url))
    proxy = proxy if not proxy or "://" in proxy else f"http://{proxy}"
    if proxy and not proxy.startswith(("http://", "https://")):
        raise UserError(f"{proxy.partition(':')[0]} proxy for {url}: set one that speaks HTTP")
    return proxy


def retry_after(headers) -> float | None:
    """Seconds to wait by the Retry-After header; None where it gives no number."""
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(headers.get("Retry-After"))
        return min(seconds, 3600.0) if seconds >= 0 else None
    return None


def in_words(error: Exception) -> str:
    """What has happened to a connection, for a reader who knows no library."""
    cause = getattr(error, "os_error", None) or error
    number = re.search(r"Errno (\d+)", str(cause))
    told = os.strerror(int(number[1])).lower() if number else type(error).__name__
    if isinstance(cause, socket.gaierror) or "DNS" in type(error).__name__:
        told = "no such host"
    elif isinstance(error, aiohttp.ClientSSLError):
        told = f"no secure connection ({' '.join(str(cause).split())[:200]})"
    elif isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        told = "it closes the connection before the end of an answer"
    proxied = aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError
    return f"its proxy: {getattr(error, 'status', told)}" if isinstance(error, proxied) else told


# ---- Replies ------------------------------------------------------------------------------------

# The ends of an answer that is whole, in lower case: OpenAI and most servers, Anthropic, Together,
# text-generation-inference, Aleph Alpha, Cohere. Any other (length, abort, ...) is a broken answer.
WHOLE = {"stop", "end_turn", "stop_sequence", "eos", "eos_token", "end_of_text", "complete"}

# What servers say of a question, and what of ourselves; `of_content` tells them apart.
FILTERED = re.compile(
    r"content[ _-]*(?:filter|polic|management|moderat|exists risk|violat)|moderation|flagged"
    r"|responsible ?ai|data[ _-]?inspection|inappropriate|usage (?:polic|guideline)|high risk"
    r"|(?<!case.)sensitive|safety|prohibited[ _]content|harmful|invalid_prompt"
    r"|(?:prompt|input|request|content)s? (?:was |were |is |has been )?blocked",
    re.I,
)
TOO_LONG = re.compile(
    r"context[ _-]*(?:length|size|window|limit)|too many tokens|max_new_tokens|reduce the length"
    r"|above_max_length|input length|too_(?:large|long)"
    r"|(?:prompt|input|request|message|sequence|token)s?\b.{0,60}(?:too (?:long|large)|longer"
    r"|exceed)|(?:max(?:imum)?\b|exceed).{0,60}(?:context|token|length|input)",
    re.I,
)
OURS = re.compile(
    r"\bkey\b(?!\")|api_key|authent|unauthori[sz]ed|credential|permission|subscription|billing"
    r"|quota|budget|credit|balance|payment|account|suspended|disabled|region|country"
    r"|unsupported|unrecogni[sz]ed|unknown (?:parameter|field|argument|name|model)|not permitted"
    r"|no such model|model_not_found|does not exist|not allowed to"
    r"|(?:model|deployment|engine)\b.{0,80}(?:not (?:exist|found|available|supported)|no access)"
    r"|(?:parameter|value|field)\b.{0,60}not supported",
    re.I,
)

UNTAKEN = r"unsupported|unrecogni[sz]ed|unknown|unexpected|deprecated|extra_forbidden|cannot both"
UNTAKEN += r"|not (?:be )?(?:support|permitted|allowed|accepted)|no longer|must be > 0.0 and < 1"


class Answer(NamedTuple):
    text: str | None  # None: no usable answer, and `finish` is the kind of failure
    finish: str  # the server's finish_reason
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False  # True: this ask cost nothing
    refused: bool = False  # True: the question's content is why, so another seed won't help


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """At most what we are willing to read; a connection left half read is closed by aiohttp."""
    try:
        return await response.content.readexactly(MAX_BODY + 1 if response.status == 200 else 4096)
    except asyncio.IncompleteReadError as short:
        return short.partial


def read_json(kind: str, content: bytes):
    """What a body of that content type says; Failure where it is no JSON of a usual size."""
    if "json" not in kind:
        raise Failure("content_type", f"it answers with {kind}, not JSON")
    if len(content) > MAX_BODY:
        raise Failure("too_large", f"it answers with more than {MAX_BODY >> 20} MB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Failure("invalid_json", "it answers with broken JSON") from None


def error_in(reply) -> int | None:
    """The status of an error that came with status 200, as gateways send it; None without one."""
    if not isinstance(reply, dict) or reply.get("choices") or not reply.get("error"):
        return None
    code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
    if isinstance(code, int) and 400 <= code < 600:
        return code
    told = json.dumps(reply["error"])
    return 400 if FILTERED.search(told) or TOO_LONG.search(told) else 502


def untaken(status: int, told: str, names) -> str | None:
    """Which of the names of a request's fields an error is about; None: it is about more."""
    if status not in (400, 422) or FILTERED.search(told):
        return None
    near = rf"(?:{UNTAKEN})[^.]{{0,80}}\b%s\b|\b%s\b[^.]{{0,80}}(?:{UNTAKEN})"
    found = (name for name in names if re.search(near % (name, name), told, re.I))
    return next(found, None)


def refusal(status: int, whole: str, url: str, key: str, headers) -> Exception:
    """What an error's status and body mean. key: what is not shown, though they may repeat it."""
    told = whole.replace(key, "[key]") if key else whole
    told = " ".join("".join(c if c.isprintable() else " " for c in told).split())[:500]
    gone = re.search(r"insufficient[_ ](?:quota|balance|funds)|exceeded_current_quota", whole)
    if status in RETRY_STATUSES and not gone:
        return Failure(str(status), f"it answers {status} ({told[:200]})", retry_after(headers))
    if not gone and (kind := of_content(status, whole)):
        return Refused(kind, f"{url} answered {status}: {told}")
    hint = "" if status != 404 or "/v1/" in url else " (does the base URL lack /v1?)"
    return UserError(f"{url} answered {status}: {told}{hint}")


def of_content(status: int, told: str) -> str | None:
    """The kind of a refusal that is about the question's content; None if it is about us. What
    the server's words leave open counts as the former, for it ends the run if it is the rule."""
    if status < 400 or status in (401, 402, 404, 405, 407):
        return None
    if FILTERED.search(told):
        return "content_filter"
    if status == 413 or TOO_LONG.search(told):
        return "too_long"
    return None if OURS.search(told) else f"refused_{status}"


def read_reply(reply) -> Answer:
    """The answer in a chat completion's JSON; text None if there is nothing to use. A content may
    be a list of parts, of which those of text are joined."""
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, finish = choice["message"], str(choice.get("finish_reason") or "stop")
        text = message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(text, list):
            thought = True
            parts = [part for part in text if part.get("type", "text") in ("text", "output_text")]
            text = "".join(part["text"] for part in parts)
        # lone surrogates are legal in JSON and nowhere else
        text = text if text is None else str.encode(text, errors="replace").decode()
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise Failure("malformed", "its answers are no chat completions") from None
    spent = [n if isinstance(n, int) and 0 <= n < 1 << 31 else 0 for n in tokens]
    if finish.lower() not in WHOLE:
        text, finish = None, re.sub(r"\W+", "_", finish.lower())[:40]
    elif text is None or not text.strip():
        finish = "reasoning_only" if thought else "null" if text is None else "empty"
        text = None
    return Answer(text, finish.encode(errors="replace").decode(), spent[0], spent[1])
