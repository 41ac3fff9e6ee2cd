"""A checkpoint as an OpenAI-compatible chat server: small teachers, tests, trying out.

    python -m teachers.serve CKPT --port 8000        prints http://127.0.0.1:8000/v1, then serves

CKPT is any folder that model.py reads. /v1/chat/completions and /v1/models answer as the official
`openai` client expects, streaming, n, stop and seed included; any model name is taken. A field that
is not known, or not supported with that value, is refused by its name, never ignored. Requests are
batched as they come (engine.py).

The same seed gives the same answer up to rounding, which depends on what shares the batch: at
temperature 1, with a vocabulary of 50,000, one answer of 48 tokens in ten goes on differently at
some token; with a small vocabulary hardly any, and at temperature 0 only where two tokens tie.

It listens to this machine alone unless told otherwise; NANOSIP_API_KEY, if set, is the key that
clients must show. Without a key only this machine's programs are answered, no page in a browser.
People with GPUs want vLLM, which is many times faster and takes far more models.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable

import torch
from aiohttp import web

from rollout import uniforms
from support import command
from support.command import UserError
from support.hub import local_folder
from teachers.engine import Engine, ModelFailed, Work
from teachers.template import Template
from world.teacher import listen

MAX_BODY = 4 << 20  # bytes of a request
MAX_TOKENS = 1 << 24  # of all answers being computed or waiting
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OURS = re.compile(r"(https?:)?//(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?", re.IGNORECASE)


class Refusal(Exception):
    """An error for the client: HTTP status, message, code and the parameter at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param=None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 429 else "server_error"
        self.body = {"error": dict(message=message, type=kind, param=param, code=code)}
        self.status = status


# --- The request ---------------------------------------------------------------------------------


def number(low, high, kind=int | float):
    def right(x) -> bool:
        return isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high

    return f"{'an integer' if kind is int else 'a number'} from {low} to {high}", right


def only(*values):
    """Where any other value would change the answer in a way that is not supported."""
    return " or ".join(map(json.dumps, values)), lambda x: x in values


def short_texts(x) -> bool:
    found = [x] if isinstance(x, str) else x
    few = isinstance(found, list) and len(found) <= 16
    return few and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in found)


ANYTHING = "anything", lambda x: True
BOOLEAN = "true or false", lambda x: isinstance(x, bool)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Every field that is taken: what it must be, in words and as a check. null is as good as absent.
FIELDS = {
    "messages": ("a list of messages", lambda x: isinstance(x, list) and x),
    "n": number(1, 128, int),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), number(1, 2**31, int)),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "stop": ("a string or a list of up to 16 strings", short_texts),
    "seed": number(-(2**63), 2**64 - 1, int),
    "stream": BOOLEAN,
    # these change no answer
    **dict.fromkeys(("metadata", "model", "stream_options", "user"), ANYTHING),
    # these would, but for the values below
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), only(0)),
    **dict.fromkeys(("logprobs", "store"), only(False)),
    "logit_bias": only({}),
    "repetition_penalty": only(1),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "top_k": only(0, -1),
}
STREAM_OPTIONS = {"include_usage": BOOLEAN, "include_obfuscation": only(False)}
CONTENT = "a string or a list of text parts", lambda x: isinstance(x, str | list) and x != []
MESSAGE = {"role": only(*ROLES), "content": CONTENT}
PART = {"type": only("text"), "text": ("a string", lambda x: isinstance(x, str))}


def checked(given, fields: dict, where: str = "", needed: Iterable = ()) -> dict:
    """The fields of an object that are not null; Refusal of the first that is not in order."""
    if not isinstance(given, dict):
        raise Refusal(400, f"{where or 'the body'} must be a JSON object", param=where or None)
    given = {name: value for name, value in given.items() if value is not None}
    for name in {**given, **dict.fromkeys(needed)}:
        path = f"{where}.{name}" if where else name
        if name not in fields:
            raise Refusal(400, f"{path:.200} is not supported", "unsupported_parameter", path)
        what, right = fields[name]
        if not right(given.get(name)):
            raise Refusal(400, f"{path} must be {what}", "invalid_value", path)
    return given


def messages_of(found: list) -> list[dict]:
    """[{"role", "content"}], content as one string."""
    messages = []
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        role, text = map(checked(message, MESSAGE, where, MESSAGE).get, MESSAGE)
        if isinstance(text, list):
            text = "".join(checked(part, PART, f"{where}.content", PART)["text"] for part in text)
        messages.append({"role": ROLES[role], "content": text})
    return messages


def work_of(body: dict, engine: Engine, template: Template) -> Work:
    """A checked body as work for the engine; Refusal where it can't be done."""
    try:
        prompt = template.encode(messages_of(body["messages"]))
    except UserError as error:
        raise Refusal(400, str(error), param="messages") from None
    n, seed = body.get("n", 1), body.get("seed", secrets.randbits(63))
    longest, read = engine.model.config.max_seq, len(prompt)
    room = min(longest - read, (engine.room - read) // n, MAX_TOKENS // n)
    asked = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    tokens = min(asked, default=max(room, 1))  # else whatever fits behind the prompt
    if tokens > room:
        what = f"a prompt of {read} tokens and {n} answers of {tokens} do not fit: the maximum"
        what += f" context length is {longest} tokens, and {engine.room} in all fit into --memory"
        raise Refusal(400, what, "context_length_exceeded")
    if n * tokens + sum(each.uniform.numel() for each in engine.works) > MAX_TOKENS:
        raise Refusal(429, "too many answers are being waited for, try again", "overloaded")
    temperature, stop = float(body.get("temperature", 1)), body.get("stop", [])
    return Work(
        prompt,
        uniforms(seed, torch.tensor([0]), n, tokens)[0],  # [n, tokens]
        temperature=temperature if temperature >= 1e-4 else 0.0,  # greedy
        top_p=max(float(body.get("top_p", 1)), 1e-6),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        follow=body.get("stream", False),
    )


# --- The answer ----------------------------------------------------------------------------------


def usage(work: Work) -> dict:
    """Tokens read and written."""
    read, written = len(work.prompt), sum(answer.sampled for answer in work.answers)
    return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


async def whole(work: Work, head: dict) -> web.Response:
    """All answers in one object."""
    texts, ends = [""] * len(work.answers), {}
    async for i, text, finish in work.pieces():
        texts[i], ends[i] = texts[i] + text, finish
    choices = []
    for i, text in enumerate(texts):
        message = {"role": "assistant", "content": text, "refusal": None}
        choices.append(dict(index=i, message=message, logprobs=None, finish_reason=ends[i]))
    return web.json_response(head | {"choices": choices, "usage": usage(work)})


async def stream(work: Work, head: dict, count: bool, http: web.Request) -> web.StreamResponse:
    """Events: who speaks, whatever text is certain, each answer's end, the tokens counted."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)

    async def send(data: dict):
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    async def send_choice(i: int, finish: str | None, **delta):
        choice = dict(index=i, delta=delta, logprobs=None, finish_reason=finish)
        await send(head | {"choices": [choice]})

    try:
        for i in range(len(work.answers)):
            await send_choice(i, None, role="assistant", content="")
        async for i, text, finish in work.pieces():
            await send_choice(i, finish, content=text)
        if count:
            await send(head | {"choices": [], "usage": usage(work)})
    except ModelFailed as error:  # the head, which says 200, is out already
        await send(Refusal(500, str(error)).body)
    await response.write(b"data: [DONE]\n\n")
    return response


# --- HTTP ----------------------------------------------------------------------------------------


def admitted(http: web.Request, key: str):
    """Refusal where the key is wrong or, without one, where a page in a browser may be asking: it
    can send neither JSON nor our own host's name without the consent that we never give."""
    if key:
        shown = http.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(shown, f"Bearer {key}".encode()):
            raise Refusal(401, "wrong or missing API key", "invalid_api_key")
    else:
        hosts = [f"//{http.headers.get('Host', '')}", *http.headers.getall("Origin", [])]
        if not all(OURS.fullmatch(host) for host in hosts):
            raise Refusal(403, "without a key only this machine is answered: say localhost")
    if http.method == "POST" and http.content_type != "application/json":
        raise Refusal(415, "the Content-Type must be application/json")


def application(folder: str, engine: Engine, key: str) -> web.Application:
    """key: what clients must show, or empty."""
    template = Template(local_folder(folder, weights=False), engine.tokenizer)
    began = int(time.time())

    async def complete(http: web.Request) -> web.StreamResponse:
        body = checked(await body_of(http), FIELDS, needed=("messages",))
        options = checked(body.get("stream_options", {}), STREAM_OPTIONS, "stream_options")
        follow = body.get("stream", False)
        if options and not follow:
            raise Refusal(400, "stream_options is for stream=true", param="stream_options")
        head = dict(id="chatcmpl-" + secrets.token_hex(12), created=int(time.time()), model=folder)
        head["object"] = "chat.completion.chunk" if follow else "chat.completion"
        work = work_of(body, engine, template)
        with engine.working_on(work):
            if follow:
                return await stream(work, head, options.get("include_usage", False), http)
            return await whole(work, head)

    async def models(http: web.Request) -> web.Response:
        model = dict(id=folder, object="model", created=began, owned_by="nanosip")
        return web.json_response({"object": "list", "data": [model]})

    @web.middleware
    async def guard(http: web.Request, handler):
        """Whatever goes wrong becomes an error in OpenAI's shape."""
        try:
            admitted(http, key)
            return await handler(http)
        except Refusal as error:
            refusal = error
        except ModelFailed as error:
            refusal = Refusal(500, str(error))
        except ConnectionError:  # the client has left, there is nobody to tell
            return web.Response()
        except web.HTTPException as error:  # no such path, wrong method, body too large
            code = error.reason.lower().replace(" ", "_")
            refusal = Refusal(error.status, f"{error.reason}: {http.path[:100]}", code)
        return web.json_response(refusal.body, status=refusal.status)

    app = web.Application(client_max_size=MAX_BODY, middlewares=[guard])
    app.add_routes([web.post("/v1/chat/completions", complete), web.get("/v1/models", models)])
    return app


async def body_of(http: web.Request):
    try:
        return json.loads(await http.read())
    except (ConnectionError, web.HTTPException):
        raise
    except Exception:  # no JSON, too deep, no text, or not compressed as it says
        raise Refusal(400, "the body is not JSON") from None


async def serve(folder: str, host: str, port: int, batch: int, memory, device: str, parent):
    """Prints the base URL and answers until it is stopped or the process `parent` is gone."""
    key = os.environ.get("NANOSIP_API_KEY", "").strip()
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host} is reached by others: set NANOSIP_API_KEY first")
    engine = Engine(folder, batch, device, memory and int(memory * 2**30))
    app = application(folder, engine, key)
    running = asyncio.create_task(engine.run())
    await listen(app, host, port, parent)
    running.cancel()


def start_server(folder, batch: int = 64):
    """Context manager: a server of the folder in a process of its own; gives its base URL."""
    start = command.python("teachers.serve", folder, f"--batch={batch}", "--port=0")
    return command.running(start)


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a checkpoint of ours, or another Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1", help="beyond this machine only with a key")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--batch", type=int, default=64, help="answers sampled at a time")
    parser.add_argument("--memory", type=float, help="GiB for their caches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parent", type=int, help="stop when this parent process is gone")
    options = parser.parse_args(arguments)
    fit = options.memory is None or options.memory > 0
    if options.batch < 1 or not 0 <= options.port < 65536 or not fit:
        parser.error("--batch from 1, --port from 0 to 65535, --memory above 0")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(**vars(options)))


if __name__ == "__main__":
    command.run(main)
