"""A chat server as its client sees it: its address, its pace, and what its replies mean.

In: a URL; status and body of the replies of an OpenAI-compatible server. Out: an `Endpoint`, which
says when the next request may leave; an `Answer`, whose text is None where a reply is none;
`Failure` for what asking again may mend; the kind of a refusal.
"""

import contextlib
import json
import os
import random
import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from requests.utils import get_environ_proxies, select_proxy

from support.command import UserError

SET_ASIDE = 10  # failures in a row after which an endpoint is only probed
SPREAD = 0.005  # seconds between two requests that leave after a pause, at first


class Failure(Exception):
    """One attempt failed and may be repeated. `kind` is what the statistics count it under, `why`
    what is told, in plain words."""

    def __init__(self, kind: str, why: str = "", retry_after: float | None = None):
        super().__init__(kind, why)
        self.kind, self.why, self.retry_after = kind, why or kind, retry_after


class Endpoint:
    """A server's address, and when the next request may leave for it.

    Rate limited: all requests pause, then leave one by one, `gap` seconds apart. Every answer
    narrows the gap by 2 %, every pause widens it by half, so that about one request in twenty is
    refused. Failing SET_ASIDE times in a row: one probe every `aside` seconds, longer and longer,
    until one succeeds. Failures of requests that left before the latest pause start no new one.
    """

    def __init__(self, url: str):
        if "@" in url or "?" in url:
            raise UserError("a key goes into OPENAI_API_KEY, not into the teacher's URL")
        try:
            good = urlsplit(url).port != 0 and re.match(r"https?://[^/:]", url)
        except ValueError:  # a port that is no number, half a bracket
            good = False
        if not good:
            raise UserError(f"a teacher's URL looks like http://host:port/v1, not {url!r}")
        self.base = url.rstrip("/")
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

    def answered(self, now: float) -> None:
        if self.aside:  # it is back: let the waiting requests come, but not all at once
            self.aside, self.gap, self.turn = 0.0, SPREAD, now
        self.failures, self.failing_since = 0, 0.0
        self.gap = 0.98 * self.gap if self.gap > 1e-4 else 0.0

    def failed(self, failure: Failure, sent: float, now: float) -> None:
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


class Answer(NamedTuple):
    text: str | None  # None: no usable answer, and `finish` is the kind of failure
    finish: str  # the server's finish_reason
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False  # True: this ask cost nothing
    refused: bool = False  # True: the question's content is why, so another seed won't help


def error_in(reply) -> int | None:
    """The status of an error that came with status 200, as gateways send it; None without one."""
    if not isinstance(reply, dict) or reply.get("choices") or not reply.get("error"):
        return None
    code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
    if isinstance(code, int) and 400 <= code < 600:
        return code
    told = json.dumps(reply["error"])
    return 400 if FILTERED.search(told) or TOO_LONG.search(told) else 502


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
