"""A checkpoint as an OpenAI-compatible chat server: small teachers, tests, trying out.

    python -m teachers.serve CKPT --port 8000        prints http://127.0.0.1:8000/v1, then serves

CKPT is any folder that model.py reads. /v1/chat/completions and /v1/models answer as the official
`openai` client expects, streaming, n, stop and seed included; any model name is taken. A field that
is not known, or not supported with that value, is refused by its name, never ignored. Requests are
batched as they come (engine.py).

The same seed gives the same answer up to rounding, which depends on what shares the batch: at
temperature 1, with a vocabulary of 50,000, one answer of 48 tokens in ten goes on differently at
some token; with a small vocabulary hardly any, and at temperature 0 only where two tokens tie.

Chats are laid out by the folder's own template; without one the messages are joined by newlines
into a plain prompt. Only the template can write special tokens: text that spells one stays text.

It listens to this machine alone unless told otherwise; NANOSIP_API_KEY, if set, is the key that
clients must show. Without a key only this machine's programs are answered, no page in a browser.
People with GPUs want vLLM, which is many times faster and takes far more models.
"""

import argparse
import asyncio
import contextlib
import functools
import hmac
import json
import logging
import os
import re
import secrets
import time

import torch
from aiohttp import web

from rollout import uniforms
from support import command
from support.command import UserError
from support.hub import local_folder
from teachers.engine import Work, load_engine
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

    def response(self) -> web.Response:
        return web.json_response(self.body, status=self.status)


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


def is_text(content) -> bool:
    """A message's content: a string, or a list of parts that are texts and nothing else."""
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        parts = [{"type": "text", "text": text} for text in texts]
        return content == parts and all(isinstance(text, str) for text in texts)
    return isinstance(content, str)


ANYTHING = "anything", lambda x: True
BOOLEAN = "true or false", lambda x: isinstance(x, bool)
COUNT = number(1, 2**31, int)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Every field that is taken: what it must be, in words and as a check. null is as good as absent.
FIELDS = {
    "messages": ("a list of messages", lambda x: isinstance(x, list) and x),
    "model": ("a string", lambda x: isinstance(x, str)),
    "n": number(1, 128, int),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "stop": ("a string or a list of up to 16 strings", short_texts),
    "seed": number(-(2**63), 2**64 - 1, int),
    "stream": BOOLEAN,
    "stream_options": ANYTHING,
    # these change no answer
    **dict.fromkeys(("metadata", "prompt_cache_key", "safety_identifier", "user"), ANYTHING),
    "parallel_tool_calls": BOOLEAN,
    "service_tier": only("auto", "default"),
    # these would, but for the values below
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), only(0)),
    **dict.fromkeys(("logprobs", "store"), only(False)),
    "logit_bias": only({}),
    "modalities": only(["text"]),
    "repetition_penalty": only(1),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "top_k": only(0, -1),
}
STREAM_OPTIONS = {"include_usage": BOOLEAN, "include_obfuscation": only(False)}
MESSAGE = {"role": only(*ROLES), "content": ("a string or a list of text parts", is_text)}


def checked(given, fields: dict, where: str = "", needed: tuple = ()) -> dict:
    """The fields of an object that are not null; Refusal of the first that is not in order."""
    if not isinstance(given, dict):
        raise Refusal(400, f"{where or 'the body'} must be a JSON object", param=where or None)
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        path = f"{where}.{name}" if where else name
        what, right = fields.get(name, (None, None))
        if what is None:
            raise Refusal(400, f"{path:.200} is not supported", "unsupported_parameter", path)
        if not right(value):
            raise Refusal(400, f"{path} must be {what}", "invalid_value", path)
    for name in set(needed) - given.keys():
        raise Refusal(
            400, f"{where or 'the body'} must have {name}", "invalid_value", where or name
        )
    return given


def messages_of(found: list) -> list[dict]:
    """[{"role", "content"}], content as one string."""
    messages = []
    for i, message in enumerate(found):
        message = checked(message, MESSAGE, f"messages[{i}]", needed=("role", "content"))
        parts = message["content"]
        text = parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
        messages.append({"role": ROLES[message["role"]], "content": text})
    return messages


class Request:
    """A checked request, and its answers as Work for the engine."""

    def __init__(self, body: dict, server: "Server"):
        body = checked(body, FIELDS, needed=("messages",))
        self.stream = body.get("stream", False)
        options = checked(body.get("stream_options", {}), STREAM_OPTIONS, "stream_options")
        if options and not self.stream:
            raise Refusal(400, "stream_options is for stream=true", param="stream_options")
        self.usage = options.get("include_usage", False)
        kind = "chat.completion.chunk" if self.stream else "chat.completion"
        self.head = dict(id="chatcmpl-" + secrets.token_hex(12), object=kind)
        self.head |= dict(created=int(time.time()), model=server.name)
        messages = messages_of(body["messages"])
        try:
            self.prompt = server.template.encode(messages)
        except UserError as error:
            raise Refusal(400, str(error), param="messages") from None
        n, seed = body.get("n", 1), body.get("seed", secrets.randbits(63))
        tokens = most_tokens(body, n, len(self.prompt), server.engine)
        temperature, stop = float(body.get("temperature", 1)), body.get("stop", [])
        self.work = Work(
            self.prompt,
            uniforms(seed, torch.tensor([0]), n, tokens)[0],  # [n, tokens]
            temperature=temperature if temperature >= 1e-4 else 0.0,  # greedy
            top_p=max(float(body.get("top_p", 1)), 1e-6),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            follow=self.stream,
        )

    def counts(self) -> dict:
        """Tokens read and written."""
        read, written = len(self.prompt), sum(a.sampled for a in self.work.answers)
        return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def most_tokens(body: dict, n: int, prompt: int, engine) -> int:
    """Of each of n answers: as asked for, else whatever fits behind the prompt's tokens."""
    longest = engine.model.config.max_seq
    room = min(longest - prompt, (engine.room - prompt) // n, MAX_TOKENS // n)
    asked = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    tokens = min(asked, default=max(room, 1))
    if tokens > room:
        what = f"a prompt of {prompt} tokens and {n} answers of {tokens} do not fit: the maximum"
        what += f" context length is {longest} tokens, and {engine.room} in all fit into --memory"
        raise Refusal(400, what, "context_length_exceeded")
    return tokens


# --- The answer ----------------------------------------------------------------------------------


class Server:
    """Requests to the engine, and word of it when their answers have gone on."""

    def __init__(self, folder: str, size: int, device: str, memory: int | None = None):
        self.engine, self.tokenizer = load_engine(folder, size, device, memory)
        self.template = Template(local_folder(folder, weights=False), self.tokenizer)
        self.name, self.began = folder, int(time.time())
        self.works: set[Work] = set()
        self.wake = asyncio.Event()

    async def work(self):
        """Steps of the engine, in a thread of their own, as long as somebody waits."""
        while await self.wake.wait():
            self.wake.clear()
            while self.engine.busy:
                try:
                    works = await asyncio.to_thread(self.engine.step)
                except Exception:
                    logging.exception("a step of the model failed")
                    works = [*self.engine.batch, *self.engine.waiting]
                    self.engine.clear()
                    self.engine.waiting.clear()
                    for answer in (answer for work in works for answer in work.answers):
                        answer.finish = answer.finish or "error"
                for work in works:
                    work.news.set()

    @contextlib.contextmanager
    def working_on(self, work: Work):
        """It is in the engine until the answer is there or nobody wants it any more."""
        if sum(each.uniform.numel() for each in (*self.works, work)) > MAX_TOKENS:
            raise Refusal(429, "too many answers are being waited for, try again", "overloaded")
        self.works.add(work)
        self.engine.waiting.append(work)
        self.wake.set()
        try:
            yield
        finally:
            work.gone = True
            self.works.remove(work)

    async def pieces(self, work: Work):
        """(number of an answer, its new text, how it ended or None), as the answers go on."""
        told = dict.fromkeys(range(len(work.answers)), 0)  # characters of those that go on
        while told:
            await work.news.wait()
            work.news.clear()
            for i, before in list(told.items()):
                finish = work.answers[i].finish  # first: the engine sets it last
                text = work.answers[i].text
                if finish == "error":
                    raise Refusal(500, "the model failed; the server's log says why")
                if finish or len(text) > before:
                    yield i, text[before:], finish
                told[i] = len(text)
                if finish:
                    del told[i]


async def answer(server: Server, http: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    request = Request(await body_of(http), server)
    with server.working_on(request.work):
        if request.stream:
            return await stream(server, request, http)
        async for _ in server.pieces(request.work):
            pass
    choices = []
    for i, a in enumerate(request.work.answers):
        message = {"role": "assistant", "content": a.text, "refusal": None}
        choices.append(dict(index=i, message=message, logprobs=None, finish_reason=a.finish))
    return web.json_response(request.head | {"choices": choices, "usage": request.counts()})


async def stream(server: Server, request: Request, http: web.Request) -> web.StreamResponse:
    """Events: who speaks, whatever text is certain, each answer's end, the tokens counted."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)

    async def send(data: dict):
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    async def send_choice(i: int, finish: str | None, **delta):
        choice = dict(index=i, delta=delta, logprobs=None, finish_reason=finish)
        await send(request.head | {"choices": [choice]})

    try:
        for i in range(len(request.work.answers)):
            await send_choice(i, None, role="assistant", content="")
        async for i, text, finish in server.pieces(request.work):
            await send_choice(i, finish, content=text)
        if request.usage:
            await send(request.head | {"choices": [], "usage": request.counts()})
    except Refusal as refusal:  # the head, which says 200, is out already
        await send(refusal.body)
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


def application(server: Server, key: str) -> web.Application:
    """key: what clients must show, or empty."""

    @web.middleware
    async def guard(http: web.Request, handler):
        """Whatever goes wrong becomes an error in OpenAI's shape."""
        try:
            admitted(http, key)
            return await handler(http)
        except Refusal as refusal:
            return refusal.response()
        except ConnectionError:  # the client has left, there is nobody to tell
            return web.Response()
        except web.HTTPException as error:  # no such path, wrong method, body too large
            code = error.reason.lower().replace(" ", "_")
            return Refusal(error.status, f"{error.reason}: {http.path[:100]}", code).response()

    app = web.Application(client_max_size=MAX_BODY, middlewares=[guard])
    app.router.add_post("/v1/chat/completions", functools.partial(answer, server))
    app.router.add_get("/v1/models", functools.partial(models, server))
    return app


async def body_of(http: web.Request):
    try:
        return json.loads(await http.read())
    except (ConnectionError, web.HTTPException):
        raise
    except Exception:  # no JSON, too deep, no text, or not compressed as it says
        raise Refusal(400, "the body is not JSON") from None


async def models(server: Server, http: web.Request) -> web.Response:
    """GET /v1/models: a list of one."""
    model = dict(id=server.name, object="model", created=server.began, owned_by="nanosip")
    return web.json_response({"object": "list", "data": [model]})


async def serve(folder: str, host: str, port: int, batch: int, memory, device: str, parent):
    """Prints the base URL and answers until it is stopped or the process `parent` is gone."""
    key = os.environ.get("NANOSIP_API_KEY", "").strip()
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host} is reached by others: set NANOSIP_API_KEY first")
    server = Server(folder, batch, device, memory and int(memory * 2**30))
    working = asyncio.create_task(server.work())
    await listen(application(server, key), host, port, parent)
    working.cancel()


def start_server(folder, batch: int = 64):
    """Context manager: a server of the folder in a process of its own; gives its base URL."""
    flags = [f"--batch={batch}", "--port=0", f"--parent={os.getpid()}"]
    return command.running(command.python("teachers.serve", folder, *flags))


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a checkpoint of ours, or a Llama-family folder")
    parser.add_argument("--host", default="127.0.0.1", help="beyond this machine only with a key")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--batch", type=int, default=64, help="answers sampled at a time")
    parser.add_argument("--memory", type=float, help="GiB for their caches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parent", type=int, help="stop when this parent process is gone")
    options = parser.parse_args(arguments)
    if options.batch < 1 or not 0 <= options.port < 65536 or (options.memory or 1) <= 0:
        parser.error("--batch from 1, --port from 0 to 65535, --memory above 0")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(**vars(options)))


if __name__ == "__main__":
    command.run(main)
