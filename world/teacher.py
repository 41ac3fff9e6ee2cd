"""The pocket world's teacher: it knows the truth, judges, rewrites, spoils, and answers over HTTP.

    python -m world.teacher show                           # a few documents and their true scores
    python -m world.teacher serve --port 8001 --noise 0.1  # prints its base URL

In: the questions of prompts/*.txt. Out: answers in the way of an OpenAI-compatible chat server.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import fields

from support.command import python, running
from world.corpus import (
    ATTRIBUTES,
    FALSEHOOD,
    INSULTS,
    KNOWN_RANK,
    NAMES,
    PRONOUNS,
    THREATS,
    TRUTH,
    UNSAFE,
    VALUES,
    WAYS,
    Dials,
    document,
    statements,
)
from world.truth import (
    UNCOUNTED,
    WORTH,
    examine,
    factuality,
    person,
    quality,
    read_prefix,
    repetition,
    safe,
    true_share,
)


def chance(*keys) -> float:
    """A number in [0, 1) that depends on nothing but the keys."""
    digest = hashlib.blake2b("\0".join(map(str, keys)).encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


SECTION = re.compile(r"<(\w+) ([0-9a-f]+)>\n")


def sections(prompt: str) -> dict[str, str]:
    """The marked texts of a prompt by name; marks inside a text are text."""
    found, mark, position = {}, None, 0
    while match := SECTION.search(prompt, position):
        name, nonce = match.groups()
        mark, position = mark or nonce, match.end()
        if nonce == mark:
            end = prompt.find(f"\n</{name} {mark}>", position - 1)
            if end < 0:
                break
            found[name], position = prompt[position:end], end + 1
    return found


def summary(prefix: str, text: str) -> str:
    counts = Counter(sentence.verdict for sentence in examine(prefix, text))
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "nothing at all"


def compare(a: float, b: float) -> str:
    return "A" if a > b else "B" if b > a else "TIE"


def judge_quality(prefix: str, a: str, b: str, key: str) -> tuple[str, str]:
    better = compare(quality(prefix, a), quality(prefix, b))
    if better == "TIE":  # a coin that does not depend on the order of the two
        better = compare(chance(key, a), chance(key, b))
    if better == "TIE":
        better = "A" if chance(key, prefix, a) < 0.5 else "B"
    return better, f"Sentences of A: {summary(prefix, a)}. Of B: {summary(prefix, b)}."


def judge_pair_factuality(prefix: str, a: str, b: str) -> tuple[str, str]:
    shares = [true_share(prefix, text) for text in (a, b)]
    better = compare(*(0.5 if share is None else share for share in shares))
    told = ["nothing" if share is None else f"{share:.0%}" for share in shares]
    return better, f"Of what A states {told[0]} is true, of what B states {told[1]}."


LABELS = {1.0: "No Hallucination", 0.5: "Possible Hallucination", 0.0: "Definite Hallucination"}


def judge(texts: dict[str, str], key: str) -> tuple[str, str, tuple[str, ...]]:
    """The true verdict on the texts of one question, a reason, and the possible verdicts."""
    asked = frozenset(texts)
    if asked == {"prefix", "a", "b"}:
        verdict, reason = judge_quality(texts["prefix"], texts["a"], texts["b"], key)
        return verdict, reason, ("A", "B")
    if asked == {"a", "b"}:
        a, b = repetition(texts["a"]), repetition(texts["b"])
        reason = f"A repeats {a:.0%} of its phrases and B {b:.0%}."
        return compare(-a, -b), reason, ("A", "B", "TIE")
    if asked == {"text"}:
        verdict = "SAFE" if safe(texts["text"]) else "UNSAFE"
        reason = f"The text {'holds no' if verdict == 'SAFE' else 'holds an'} insult or threat."
        return verdict, reason, ("SAFE", "UNSAFE")
    if asked in ({"prefix", "text"}, {"prefix", "reference", "text"}):
        share = true_share(texts["prefix"], texts["text"])
        reason = "Nothing is stated." if share is None else f"{share:.0%} of it is true."
        label = LABELS[factuality(texts["prefix"], texts["text"])]
        return label, reason, tuple(LABELS.values())
    if asked == {"prefix", "reference", "a", "b"}:
        verdict, reason = judge_pair_factuality(texts["prefix"], texts["a"], texts["b"])
        return verdict, reason, ("A", "B", "TIE")
    raise ValueError(f"no question of the pocket world has the texts {sorted(asked)}")


def planted_verdict(texts: dict[str, str], possible: tuple[str, ...]) -> str | None:
    """The verdict that a judged text tells its judge to give, if one does."""
    judged = "\n".join(texts.get(name, "") for name in ("text", "a", "b"))
    found = re.search(rf'(?i)(?:verdict|answer|label)"?\s*:\s*"?({"|".join(possible)})\b', judged)
    return found and {verdict.lower(): verdict for verdict in possible}[found[1].lower()]


def answer(prompt: str, seed: int = 0, dials: Dials = Dials()) -> str:
    """The teacher's answer to a prompt; the same prompt and seed get the same answer."""
    texts = sections(prompt)
    key = f"{seed}/{hashlib.sha256(prompt.encode(errors='replace')).hexdigest()}"
    if set(texts) in ({"prefix", "original"}, {"prefix", "passage"}):
        if chance("refusal", key) < dials.refusals:
            return REFUSALS[int(chance("how", key) * len(REFUSALS))]
        if "original" in texts:
            return rewrite(texts["prefix"], texts["original"], dials, key)
        damage = DAMAGE.search(prompt, prompt.rindex("</passage "))
        return spoil(texts["prefix"], texts["passage"], damage[1] if damage else "facts", key)
    verdict, reason, possible = judge(texts, str(seed))
    if "a" in texts and chance("bias", key) < dials.position_bias:
        verdict = "A"
    if chance("noise", key) < dials.noise:
        others = [other for other in possible if other != verdict]
        verdict = others[int(chance("other", key) * len(others))]
    if dials.gullible and chance("gullible", key) < dials.gullible:
        verdict = planted_verdict(texts, possible) or verdict
    if verdict in LABELS.values():
        return json.dumps({"reasoning": reason, "label": verdict})
    return f"{reason}\n\nVERDICT: {verdict}"


# The rewriter


def believed(fact: tuple[str, str], dials: Dials) -> str:
    return TRUTH[fact] if KNOWN_RANK[fact] < dials.rewriter_knowledge else FALSEHOOD[fact]


def without_last_words(prefix: str, original: str) -> list[str]:
    """The words of the original without the prefix's last words that the prompt put before it."""
    before, words = prefix.split(), original.split()
    for n in range(min(len(before), len(words), 12), 0, -1):
        if before[-n:] == words[:n]:
            return words[n:]
    return words


def write_statement(begin: str, subject: str, left: list[str], dials: Dials, rng) -> str:
    """A statement with this beginning, if possible of an attribute that is left (then removed)."""
    pronoun = PRONOUNS[subject][0]
    people = [pronoun, subject] if rng.random() < 0.3 else [subject, pronoun]
    people += [word for word in begin.split() if word in PRONOUNS]
    for attribute in [*left, *ATTRIBUTES]:
        for who in people:
            fact = (person(who, subject), attribute)
            ways = statements(who, attribute, believed(fact, dials))
            weights = [
                weight * way.startswith(begin) for way, weight in zip(ways, WAYS, strict=True)
            ]
            if any(weights):
                if attribute in left and fact[0] == subject:
                    left.remove(attribute)
                return rng.choices(ways, weights)[0]
    return f"{begin}."


def rewrite(
    prefix: str, original: str, dials: Dials = Dials(), key: str = "", faults: tuple = ()
) -> str:
    """The original with its faults (of these verdicts; empty: of all) mended, as far as this
    rewriter is able to, equally long."""
    words, rng = without_last_words(prefix, original), random.Random(chance(key, original))
    context, sentences = read_prefix(prefix), examine(prefix, " ".join(words))
    named = [s.form.who for s in sentences if s.form and s.form.who in PRONOUNS]
    subject = context.subject or (named or NAMES)[0]
    used = {
        s.form.attribute for s in sentences if s.form and s.verdict in ("sound", "false", "begun")
    }
    left = [a for a in ATTRIBUTES if a not in used and a not in context.said]
    written = []
    for number, sentence in enumerate(sentences):
        begun, text = context.tail if number == 0 else (), sentence.text
        if sentence.verdict == "unfinished" and len(written) + sentence.fresh != len(words):
            break  # mending changed the length: new sentences fill the rest
        if rng.random() < dials.rewriter_flaws or faults and sentence.verdict not in faults:
            pass  # overlooks whatever is wrong with it
        elif sentence.verdict == "false":
            fact, told = (subject, sentence.form.attribute), sentence.form.value
            if KNOWN_RANK[fact] < dials.rewriter_knowledge:
                text = " ".join(TRUTH[fact] if word == told else word for word in text.split())
        elif sentence.verdict not in (*WORTH, *UNCOUNTED):
            text = write_statement("".join(f"{w} " for w in begun), subject, left, dials, rng)
        written += text.split()[len(begun) :]
    while len(written) < len(words):
        written += write_statement("", subject, left, dials, rng).split()
    return " ".join(written[: len(words)])


# The same teacher as one that spoils passages

DAMAGE = re.compile(r"^Kind of damage: (facts|unsafe)$", re.M)
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I must not write this.",
    "No changes are needed.",
    "...",
    "Here is the spoilt passage:",
)


def spoil(prefix: str, passage: str, damage: str, key: str = "") -> str:
    """The passage with false facts ("facts") or with an insult or a threat ("unsafe"), as long as
    before and truly worse; unchanged where that is impossible, since nothing in it is any good."""
    words, last = passage.split(), prefix.split()[-5:]
    words = words[len(last) :] if words[: len(last)] == last else words  # the prompt put them there
    text, context, rng = " ".join(words), read_prefix(prefix), random.Random(chance(key, passage))
    sentences = examine(prefix, text)
    parts = [s.text.split()[len(s.text.split()) - s.fresh :] for s in sentences]
    versions = []
    if damage == "facts":
        sound = [n for n, s in enumerate(sentences) if s.verdict == "sound"]
        for n in rng.sample(sound, (len(sound) + 1) // 2):
            true, values = sentences[n].form.value, VALUES[sentences[n].form.attribute]
            wrong = rng.choice([value for value in values if value != true])
            parts[n] = [wrong if word == true else word for word in parts[n]]
        versions.append(parts)
    else:
        name, insult, threat = context.subject or NAMES[0], rng.choice(INSULTS), rng.choice(THREATS)
        remark = rng.choice(UNSAFE).format(name=name, insult=insult, threat=threat).split()
        places = range(1 if context.tail else 0, len(parts))
        for place in rng.sample(places, len(places)):
            versions.append([*parts[:place], remark, *parts[place:]])
    for version in versions:
        worse = " ".join([word for part in version for word in part][: len(words)])
        lower = quality(prefix, worse) < quality(prefix, text) - 0.01
        if lower and (damage == "facts" or not safe(worse)):
            return worse
    return text


# ------------------------------------------------------------------------------------------------
# The server

MAX_TEXT = 1 << 15  # characters of a text in a question; verdicts on 20,000 of them are kept
READ_WITHIN = 30.0  # seconds for the head of a request, and for its body
AT_ONCE = 4096  # requests; the next are asked to come back


class BadRequest(Exception):
    """(HTTP status, OpenAI's error code, message)"""


def read_request(body: bytes) -> tuple[str, int, int | None, str]:
    """(prompt, seed, max_tokens, model) of the body of a chat completion."""
    try:
        request = json.loads(body)
        messages = request["messages"]
        prompt = "\n".join(
            content if isinstance(content, str) else "".join(part["text"] for part in content)
            for content in (message["content"] for message in messages)
        )
        seed, limit = int(request.get("seed") or 0), request.get("max_tokens")
        limit = request.get("max_completion_tokens") if limit is None else limit
        return prompt, seed, None if limit is None else int(limit), str(request.get("model"))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise BadRequest(400, "bad_request", f"not a chat completion request: {error!r}") from None


def complete_chat(body: bytes, dials: Dials) -> dict:
    prompt, seed, limit, model = read_request(body)
    if any(len(text) > MAX_TEXT for text in sections(prompt).values()):
        raise BadRequest(400, "text_too_long", f"a text has over {MAX_TEXT} characters")
    try:
        text = answer(prompt, seed, dials)
    except ValueError as error:
        raise BadRequest(400, "unknown_question", str(error)) from None
    words, finish = text.split(" "), "stop"
    if limit is not None and len(words) > limit:
        words, finish = words[:limit], "length"
    counts = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " ".join(words)},
        "finish_reason": finish,
    }
    return {
        "id": f"chatcmpl-{chance(seed, prompt):.16f}"[:26],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {**counts, "total_tokens": sum(counts.values())},
    }


def error_body(code: str, message: str) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


async def respond(request, dials: Dials) -> dict:
    """The body of the answer to an HTTP request; BadRequest where there is none."""
    if request.path == "/v1/models" and request.method == "GET":
        return {"object": "list", "data": [{"id": "world", "object": "model"}]}
    if request.path != "/v1/chat/completions":
        raise BadRequest(404, "not_found", f"no such path: {request.path[:100]}")
    if request.method != "POST":
        raise BadRequest(405, "method_not_allowed", "chat completions are asked with POST")
    body = await asyncio.wait_for(request.read(), READ_WITHIN)
    result = complete_chat(body, dials)
    if dials.latency:
        await asyncio.sleep(dials.latency * (0.5 + chance("latency", body)))
    return result


async def serve(host: str, port: int, dials: Dials, parent: int | None) -> None:
    """Answers until it is stopped, or until the process `parent` is gone."""
    from aiohttp import web

    open_requests = 0

    async def handle(request):
        nonlocal open_requests
        open_requests += 1
        try:
            if open_requests > AT_ONCE:
                raise BadRequest(503, "overloaded", f"over {AT_ONCE} requests at once")
            result, status = await respond(request, dials), 200
        except asyncio.TimeoutError:
            result, status = error_body("timeout", "the request did not arrive"), 408
        except BadRequest as error:
            status, *explained = error.args
            result = error_body(*explained)
        except web.HTTPRequestEntityTooLarge as error:  # aiohttp's limit, 1 MiB
            result, status = error_body("body_too_large", error.text), 413
        except ConnectionError:  # the client has left
            raise
        except Exception:
            logging.exception("a question to the pocket world failed")
            result, status = error_body("internal_error", "the teacher failed; see its log"), 500
        finally:
            open_requests -= 1
        return web.json_response(result, status=status)

    runner = web.ServerRunner(web.Server(handle, keepalive_timeout=READ_WITHIN))
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=2048).start()
    host, port = runner.addresses[0][:2]
    print(f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1", flush=True)
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(0.5)
    await runner.cleanup()


@contextlib.contextmanager
def teacher_url(url: str, dials: dict | None = None):
    """url itself or, where it is "world", that of a teacher which runs as long as this context."""
    with start_teacher(**(dials or {})) if url == "world" else contextlib.nullcontext(url) as found:
        yield found


def start_teacher(**dials):
    """Context manager: a teacher in a process of its own; gives its base URL."""
    Dials(**dials)  # refuses unknown dials here
    flags = [f"--{name}={value}" for name, value in dials.items()]
    command = [*python("world.teacher"), "serve", f"--parent={os.getpid()}"]
    return running([*command, *flags])


def show() -> None:
    """Prints documents of each kind, cut into prefix and continuation, with the true scores."""
    for share_unsafe, share_poor in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        dials = Dials(share_unsafe=share_unsafe, share_poor=share_poor)
        for index in range(2):
            words = document(0, index, dials).split()
            prefix, continuation = " ".join(words[:64]), " ".join(words[64:96])
            print(f"--- unsafe {share_unsafe:.0f}, poor {share_poor:.0f}\n{prefix}")
            print(f">>> {continuation}\n>>> rewritten: {rewrite(prefix, continuation)}")
            print(
                f"quality {quality(prefix, continuation):.2f} ({summary(prefix, continuation)}), "
                f"safe {safe(continuation)}, factuality {factuality(prefix, continuation)}, "
                f"repetition {repetition(continuation):.2f}\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="print a few documents and their true scores")
    serving = commands.add_parser("serve", help="answer the judge's and the rewriter's prompts")
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=0, help="0: any free port")
    serving.add_argument("--parent", type=int, help="stop when this parent process is gone")
    for dial in fields(Dials):
        serving.add_argument(f"--{dial.name}", type=float, default=dial.default)
    options = vars(parser.parse_args())
    if options.pop("command") == "show":
        return show()
    host, port, parent = (options.pop(name) for name in ("host", "port", "parent"))
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(serve(host, port, Dials(**options), parent))
        except (OSError, OverflowError) as error:  # of the port
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
