"""What a chat server's reply means: an answer, a failure that may pass, or a refusal.

In: status and body of an OpenAI-compatible server's reply. Out: an `Answer`, whose text is None
where the reply is none; `Failure` for what asking again may mend; the kind of a refusal.
"""

import json
import re
from typing import NamedTuple

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


class Failure(Exception):
    """One attempt failed and may be repeated. `kind` is what the statistics count it under, `why`
    what is told, in plain words."""

    def __init__(self, kind: str, why: str = "", retry_after: float | None = None):
        super().__init__(kind, why)
        self.kind, self.why, self.retry_after = kind, why or kind, retry_after


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
