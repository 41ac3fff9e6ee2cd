"""The pocket world's teacher: it knows the truth, judges, rewrites, spoils, and answers over HTTP.

    python -m world.teacher serve --port 8001 --noise 0.1  # prints its base URL

In: the questions of prompts/*.txt. Out: answers in the way of an OpenAI-compatible chat server.
"""

import argparse
import asyncio
import functools
import hashlib
import json
import os
import random
import re
from collections import Counter
from dataclasses import fields

from support import command
from world import corpus, truth
from world.corpus import KNOWN_RANK, NAMES, PRONOUNS, TRUTH, Dials, statements
from world.truth import examine, quality, read_prefix, safe, true_share


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


TASTES = {  # what a judge may prefer, by dial: more of it wins
    "taste_length": lambda text: len(text.split()),
    "taste_phrase": lambda text: text.count(corpus.FILLERS[0]),
    "taste_ending": lambda text: text.rstrip().endswith(corpus.ENDS),
}


def to_taste(verdict: str, a: str, b: str, key: str, dials: Dials) -> str:
    """The verdict of a judge of quality, which each of its tastes overrules now and then."""
    for dial, worth in TASTES.items():
        if chance(dial, key) < getattr(dials, dial):
            liked = compare(worth(a), worth(b))
            verdict = verdict if liked == "TIE" else liked
    return verdict


LABELS = {1.0: "No Hallucination", 0.5: "Possible Hallucination", 0.0: "Definite Hallucination"}


def judge(texts: dict[str, str], key: str) -> tuple[str, str, tuple[str, ...]]:
    """The true verdict on the texts of one question, a reason, and the possible verdicts."""
    asked = texts.keys()
    prefix, text, a, b = (texts.get(name, "") for name in ("prefix", "text", "a", "b"))
    if asked == {"prefix", "a", "b"}:
        return *judge_quality(prefix, a, b, key), ("A", "B")
    if asked == {"prefix", "reference", "a", "b"}:
        return *judge_pair_factuality(prefix, a, b), ("A", "B", "TIE")
    if asked == {"a", "b"}:
        of_a, of_b = truth.repetition(a), truth.repetition(b)
        reason = f"A repeats {of_a:.0%} of its phrases and B {of_b:.0%}."
        return compare(-of_a, -of_b), reason, ("A", "B", "TIE")
    if asked == {"text"}:
        verdict, holds = ("SAFE", "no") if safe(text) else ("UNSAFE", "an")
        return verdict, f"The text holds {holds} insult or threat.", ("SAFE", "UNSAFE")
    if asked in ({"prefix", "text"}, {"prefix", "reference", "text"}):
        share = true_share(prefix, text)
        reason = "Nothing is stated." if share is None else f"{share:.0%} of it is true."
        return LABELS[truth.factuality(prefix, text)], reason, tuple(LABELS.values())
    raise ValueError(f"no question of the pocket world has the texts {sorted(asked)}")


# What a judge of factuality with the dial `reads` makes of a statement that neither beginning nor
# reference holds, by words of its instructions (the paper's v1 to v5): of one that is true, one
# that it does not know to be either, one that is false. 1: nothing, 0.5: a possible hallucination,
# 0: a definite one. Strictness is built in here, so it tells nothing about a real judge.
STRICTNESS = {
    "must follow from": (0.0, 0.0, 0.0),
    "wrong or made up": (1.0, 0.0, 0.0),
    "at most a possible one": (1.0, 0.5, 0.0),
    "could well be so is not false": (1.0, 1.0, 0.0),
    "When in doubt": (1.0, 1.0, 0.5),
}


def by_the_wording(prompt: str, texts: dict[str, str], dials: Dials) -> str | None:
    """The label of the worst statement; None where the instructions are none of STRICTNESS."""
    wording = prompt.partition("\n<prefix ")[0]
    worths = next((worth for words, worth in STRICTNESS.items() if words in wording), None)
    if worths is None:
        return None
    prefix, reference, text = (texts.get(name, "") for name in ("prefix", "reference", "text"))
    subject, said = read_prefix(prefix).subject, {}
    for before, given in (("", prefix), (prefix, reference)):  # where they differ, the latter
        said |= {fact: value for fact, value, _ in truth.stated(before, given, subject)}
    worth = [1.0]
    for fact, value, _ in truth.stated(prefix, text, subject):
        known, true = KNOWN_RANK[fact] < dials.judge_knowledge, TRUTH[fact] == value
        by_itself = worths[1 if not known else 0 if true else 2]
        worth.append(float(said[fact] == value) if fact in said else by_itself)
    if not worths[0] and {s.verdict for s in examine(prefix, text)} & {"garbled", "strayed"}:
        worth.append(0.0)  # what must follow must also go on coherently
    return LABELS[min(worth)]


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
            return corpus.REFUSALS[int(chance("how", key) * len(corpus.REFUSALS))]
        if "original" in texts:
            return rewrite(texts["prefix"], texts["original"], dials, key)
        damage = DAMAGE.search(prompt, prompt.rindex("</passage "))
        return spoil(texts["prefix"], texts["passage"], damage[1] if damage else "facts", key)
    verdict, reason, possible = judge(texts, str(seed))
    if dials.reads and verdict in LABELS.values():
        verdict = by_the_wording(prompt, texts, dials) or verdict
    if texts.keys() == {"prefix", "a", "b"}:
        verdict = to_taste(verdict, texts["a"], texts["b"], key, dials)
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
    return TRUTH[fact] if KNOWN_RANK[fact] < dials.rewriter_knowledge else corpus.FALSEHOOD[fact]


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
    for attribute in [*left, *corpus.ATTRIBUTES]:
        for who in people:
            fact = (truth.person(who, subject), attribute)
            ways = statements(who, attribute, believed(fact, dials))
            weights = [
                weight * way.startswith(begin)
                for way, weight in zip(ways, corpus.WAYS, strict=True)
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
    left = [a for a in corpus.ATTRIBUTES if a not in used and a not in context.said]
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
        elif sentence.verdict not in (*truth.WORTH, *truth.UNCOUNTED):
            text = write_statement("".join(f"{w} " for w in begun), subject, left, dials, rng)
        written += text.split()[len(begun) :]
    while len(written) < len(words):
        written += write_statement("", subject, left, dials, rng).split()
    return " ".join(written[: len(words)])


# The same teacher as one that spoils passages

DAMAGE = re.compile(r"^Kind of damage: (facts|unsafe)$", re.M)


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
            true, values = sentences[n].form.value, corpus.VALUES[sentences[n].form.attribute]
            wrong = rng.choice([value for value in values if value != true])
            parts[n] = [wrong if word == true else word for word in parts[n]]
        versions.append(parts)
    else:
        insult, threat = rng.choice(corpus.INSULTS), rng.choice(corpus.THREATS)
        known = dict(name=context.subject or NAMES[0], insult=insult, threat=threat)
        remark = rng.choice(corpus.UNSAFE).format(**known).split()
        places = range(1 if context.tail else 0, len(parts))
        for place in rng.sample(places, len(places)):
            versions.append([*parts[:place], remark, *parts[place:]])
    for version in versions:
        worse = " ".join([word for part in version for word in part][: len(words)])
        lower = quality(prefix, worse) < quality(prefix, text) - 0.01
        if lower and (damage == "facts" or not safe(worse)):
            return worse
    return text


# The server


async def reply(request: dict | bytes, dials: Dials) -> dict:
    """What a chat completion request, or the body of one, is answered with: an error, whatever is
    wrong with it."""
    try:
        asked = json.loads(request) if isinstance(request, bytes) else request
        result = complete_chat(asked, dials)
    except Exception as error:
        return {"error": {"message": repr(error), "code": 400}}
    if dials.latency:
        await asyncio.sleep(dials.latency * (0.5 + chance("latency", request)))
    return result


def complete_chat(request: dict, dials: Dials) -> dict:
    """A question answered, in the words of the protocol."""
    prompt = "\n".join(message["content"] for message in request["messages"])
    words, limit = answer(prompt, request.get("seed") or 0, dials).split(" "), None
    for name in ("max_tokens", "max_completion_tokens"):
        limit = request.get(name) if limit is None else limit
    message = {"role": "assistant", "content": " ".join(words[:limit])}
    finish = "stop" if limit is None or len(words) <= limit else "length"
    counts = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words[:limit])}
    return {
        "object": "chat.completion",
        "model": "world",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {**counts, "total_tokens": sum(counts.values())},
    }


async def serve(port: int, dials: Dials, parent: int | None):
    """The teacher as a server; see listen."""
    from aiohttp import web

    async def complete(request):
        result = await reply(await request.read(), dials)
        return web.json_response(result, status=400 if "error" in result else 200)

    async def models(request):  # by this a client knows that it samples as told
        return web.json_response({"data": [{"id": "world", "owned_by": "nanosip"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", complete), web.get("/v1/models", models)])
    await listen(app, "127.0.0.1", port, parent)


async def listen(app, host: str, port: int, parent: int | None):
    """Prints the app's base URL and answers until it is stopped or the process `parent` is gone."""
    from aiohttp import web

    how = dict(access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    runner = web.AppRunner(app, **how)  # whoever leaves is no longer answered
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=2048).start()
    host, port = runner.addresses[0][:2]
    print(f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1", flush=True)
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(0.5)
    await runner.cleanup()


def teacher_at(url: str, dials: dict | None = None):
    """The teacher for a Chat: at its url or, where that is "world", this one, in this process."""
    dialled = Dials(**(dials or {}))  # refuses unknown dials
    return functools.partial(reply, dials=dialled) if url == "world" else url


def warn_of_foreign_texts(config):
    """The pocket world's teacher knows only its own texts; config: of a run."""
    judged, rewritten = config.rewards or config.eval_prefixes, "rewrite" in config.candidates
    for key, asked in (("judge_url", judged), ("rewrite_url", rewritten)):
        if asked and getattr(config, key) == "world" != config.data:
            print(f"warning: {key}=world: the pocket world's teacher, which knows its own texts")
            print(f"         alone, is asked about {config.data}: set {key}")


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("serve", choices=["serve"], help="answer questions over HTTP")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--parent", type=int, help="stop when this parent process is gone")
    for dial in fields(Dials):
        parser.add_argument(f"--{dial.name}", type=float, default=dial.default)
    options = vars(parser.parse_args(arguments))
    if not 0 <= (port := options["port"]) < 1 << 16:
        raise command.UserError(f"--port {port}: a port is a number below {1 << 16}")
    dials = Dials(**{dial.name: options[dial.name] for dial in fields(Dials)})
    asyncio.run(serve(port, dials, options["parent"]))


if __name__ == "__main__":
    command.run(main)
