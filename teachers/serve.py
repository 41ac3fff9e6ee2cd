"""A checkpoint as an OpenAI-compatible chat server: small teachers, tests, trying out.

    python -m teachers.serve CKPT --port 8000        prints http://127.0.0.1:8000/v1, then serves

CKPT is any folder that model.py reads. /v1/chat/completions and /v1/models answer as the official
`openai` client expects, streaming, n, stop and seed included; any model name is taken. A field that
is not known, or not supported with that value, is refused by its name, never ignored. Requests are
batched as they come (engine.py).

The same seed gives the same answer up to rounding: what shares the batch moves logits by some 1e-5,
and where a random number falls that close to the border of two tokens (or, at temperature 0, where
two tokens are that close to a tie) the answer goes on differently. At temperature 1, with a
vocabulary of 50,000, that is one answer of 48 tokens in ten; with a small vocabulary hardly any.

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

MAX_BODY = 4 << 20  # bytes of a request
MAX_ANSWERS = 4096  # being computed or waiting, over all requests
MAX_TOKENS = 1 << 24  # that these may have, over all requests
MAX_SECONDS = 600.0  # for one request
IDLE_SECONDS = 30.0  # until the whole head of a request is there
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OURS = re.compile(r"(https?:)?//(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?", re.IGNORECASE)


class Refusal(Exception):
    """An error for the client: HTTP status, message, code and the parameter at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param=None):
        super().__init__(message)
        kinds = {429: "rate_limit_error", 500: "server_error", 504: "timeout"}
        self.status, kind = status, kinds.get(status, "invalid_request_error")
        self.body = {"error": dict(message=message, type=kind, param=param, code=code)}

    def response(self) -> web.Response:
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return web.json_response(self.body, status=self.status, headers=headers)


# --- The request ---------------------------------------------------------------------------------


def number(low, high, whole=False):
    def right(x) -> bool:
        real = isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
        return real and (not whole or x == int(x))

    return f"{'an integer' if whole else 'a number'} from {low} to {high}", right


def only(*values):
    """Where any other value would change the answer in a way that is not supported."""
    allowed = [json.dumps(value) for value in values]
    return " or ".join(allowed), lambda x: json.dumps(x) in allowed


def short_texts(x) -> bool:
    found = [x] if isinstance(x, str) else x
    few = isinstance(found, list) and len(found) <= 16
    return few and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in found)


ANYTHING = "anything", lambda x: True
BOOLEAN = "true or false", lambda x: isinstance(x, bool)
STRING = "a string", lambda x: isinstance(x, str)
ZERO, COUNT = number(0, 0), number(1, 2**31, whole=True)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Every field that is taken: what it must be, in words and as a check. null is as good as absent.
FIELDS = {
    "messages": ("a list", lambda x: isinstance(x, list)),
    "model": STRING,
    "n": number(1, 128, whole=True),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "stop": ("a string or a list of up to 16 strings", short_texts),
    "seed": number(-(2**63), 2**64 - 1, whole=True),
    "stream": BOOLEAN,
    "stream_options": ANYTHING,
    # these change no answer
    **dict.fromkeys(("metadata", "prompt_cache_key", "safety_identifier", "user"), ANYTHING),
    "parallel_tool_calls": BOOLEAN,
    "service_tier": only("auto", "default"),
    # these would, but for the values below
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), ZERO),
    **dict.fromkeys(("logprobs", "store"), only(False)),
    "logit_bias": only({}),
    "modalities": only(["text"]),
    "repetition_penalty": number(1, 1),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "top_k": only(0, -1),
}
STREAM_OPTIONS = {"include_usage": BOOLEAN, "include_obfuscation": only(False)}
MESSAGE = {"role": (" or ".join(ROLES), lambda x: x in list(ROLES)), "content": ANYTHING}
PART = {"type": only("text"), "text": STRING}


def checked(given, fields: dict, where: str = "") -> dict:
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
    return given


def messages_of(found: list) -> list[dict]:
    """[{"role", "content"}], content as one string."""
    if not found:
        raise Refusal(400, "messages must be a list of at least one message", param="messages")
    messages = []
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        message = checked(message, MESSAGE, where)
        content = message.get("content")
        if isinstance(content, list) and content:
            parts = [checked(p, PART, f"{where}.content[{j}]") for j, p in enumerate(content)]
            whole = all(part.keys() == PART.keys() for part in parts)
            content = "".join(part["text"] for part in parts) if whole else None
        if not isinstance(content, str) or "role" not in message:
            what = f"{where} must have a role, and content: a string or a list of text parts"
            raise Refusal(400, what, "invalid_value", where)
        messages.append({"role": ROLES[message["role"]], "content": content})
    return messages


class Request:
    """A checked request, and its answers as Work for the engine."""

    def __init__(self, body: dict, server: "Server"):
        body = checked(body, FIELDS)
        self.stream, self.news = body.get("stream", False), asyncio.Event()
        options = checked(body.get("stream_options", {}), STREAM_OPTIONS, "stream_options")
        if options and not self.stream:
            raise Refusal(400, "stream_options is for stream=true", param="stream_options")
        self.usage = options.get("include_usage", False)
        self.id, self.created = "chatcmpl-" + secrets.token_hex(12), int(time.time())
        messages = messages_of(body.get("messages", []))
        try:
            self.prompt = server.template.encode(messages)
        except UserError as error:
            raise Refusal(400, str(error), param="messages") from None
        n = int(body.get("n", 1))
        tokens = most_tokens(body, len(self.prompt), server.engine, n)
        if n * tokens > MAX_TOKENS:
            raise Refusal(400, f"{n} answers of {tokens} tokens are above {MAX_TOKENS} in all")
        seed, stop = int(body.get("seed", secrets.randbits(63))), body.get("stop", [])
        u = uniforms(seed, torch.tensor([0]), n, tokens)[0]  # [n, tokens]
        temperature = float(body.get("temperature", 1))
        how = dict(
            temperature=temperature if temperature >= 1e-4 else 0.0,  # greedy
            top_p=max(float(body.get("top_p", 1)), 1e-6),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        self.work = Work(self.prompt, u, **how)
        if server.engine.needs([self.work]) > server.engine.room:
            what = f"{n} answers of {tokens} tokens do not fit into this server's --memory"
            raise Refusal(400, what, "out_of_memory")

    def counts(self) -> dict:
        """Tokens read and written."""
        read, written = len(self.prompt), sum(a.sampled for a in self.work.answers)
        return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def most_tokens(body: dict, prompt: int, engine, n: int) -> int:
    """Of one answer: as asked for, else whatever there is room for behind the prompt's tokens."""
    asked = {body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(asked) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
    longest = engine.model.config.max_seq
    room = min(longest - prompt, (engine.room - prompt) // n)
    tokens = int(min(asked, default=max(room, 1)))
    if prompt + tokens > longest:
        what = f"a prompt of {prompt} tokens and {tokens} more are above"
        what = f"{what} this model's maximum context length of {longest}"
        raise Refusal(400, what, "context_length_exceeded")
    return tokens


# --- The answer ----------------------------------------------------------------------------------


class Server:
    """Requests to the engine, and its answers in OpenAI's shapes."""

    def __init__(self, folder: str, size: int, device: str, memory: int | None = None):
        self.engine, self.tokenizer = load_engine(folder, size, device, memory)
        self.template = Template(local_folder(folder, weights=False), self.tokenizer)
        self.name, self.began = folder, int(time.time())
        self.requests: dict = {}  # by their work
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
                    request = self.requests.get(work)
                    if request and (request.stream or work.done()):
                        request.news.set()

    @contextlib.contextmanager
    def working_on(self, request: Request):
        """It is in the engine until the answer is there or nobody wants it any more."""
        works = [*self.requests, request.work]
        answers, tokens = (sum(f(w.uniform) for w in works) for f in (len, torch.numel))
        if answers > MAX_ANSWERS or tokens > MAX_TOKENS:
            raise Refusal(429, "too many answers are being waited for, try again", "overloaded")
        self.requests[request.work] = request
        self.engine.waiting.append(request.work)
        self.wake.set()
        try:
            yield
        finally:
            request.work.gone = True
            del self.requests[request.work]

    async def progress(self, request: Request):
        """Until some answer has gone on."""
        await request.news.wait()
        request.news.clear()
        if any(answer.finish == "error" for answer in request.work.answers):
            raise Refusal(500, "the model failed; the server's log says why", "internal_error")

    async def complete(self, request: Request) -> dict:
        with self.working_on(request):
            while not request.work.done():
                await self.progress(request)
        choices = []
        for i, answer in enumerate(request.work.answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choices.append(
                dict(index=i, message=message, logprobs=None, finish_reason=answer.finish)
            )
        return self.envelope(request, choices) | {"usage": request.counts()}

    async def stream(self, request: Request, send):
        """Chunks for `send`: whatever text of a row is certain, and the rest with its end."""
        told = dict.fromkeys(
            range(len(request.work.answers)), 0
        )  # characters of each unfinished row
        no_usage = {"usage": None} if request.usage else {}
        with self.working_on(request):
            while told:
                await self.progress(request)
                for i, before in list(told.items()):
                    answer = request.work.answers[i]
                    finish, text = answer.finish, answer.text  # in this order
                    if len(text) == before and not finish:
                        continue
                    delta = {"content": text[before:]} | ({} if before else {"role": "assistant"})
                    choice = dict(index=i, delta=delta, logprobs=None, finish_reason=finish)
                    await send(self.envelope(request, [choice]) | no_usage)
                    told[i] = len(text)
                    if finish:
                        del told[i]
        if request.usage:
            await send(self.envelope(request, []) | {"usage": request.counts()})

    def envelope(self, request: Request, choices: list) -> dict:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        named = dict(id=request.id, object=kind, created=request.created, model=self.name)
        return named | {"choices": choices}


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
        except Exception:
            logging.exception("a request failed")
            return Refusal(500, "the server failed; its log says why", "internal_error").response()

    app = web.Application(client_max_size=MAX_BODY, middlewares=[guard])
    app.router.add_post("/v1/chat/completions", functools.partial(answer, server))
    app.router.add_get("/v1/models", functools.partial(models, server))
    app.router.add_get("/v1/models/{name:.+}", functools.partial(models, server))
    return app


async def body_of(http: web.Request):
    try:
        return json.loads(await asyncio.wait_for(http.read(), IDLE_SECONDS))
    except (ConnectionError, web.HTTPException):
        raise
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body took more than {IDLE_SECONDS:.0f} s") from None
    except Exception:  # no JSON, too deep, no text, or not compressed as it says
        raise Refusal(400, "the body is not JSON") from None


async def answer(server: Server, http: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    request = Request(await body_of(http), server)
    response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
    response.content_type = "text/event-stream"

    async def send(data: dict):
        if not response.prepared:
            await response.prepare(http)
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    working = server.stream(request, send) if request.stream else server.complete(request)
    try:
        whole = await asyncio.wait_for(working, MAX_SECONDS)
        if not request.stream:
            return web.json_response(whole)
    except (Refusal, asyncio.TimeoutError) as error:
        if not isinstance(error, Refusal):
            error = Refusal(504, f"no answer within {MAX_SECONDS:.0f} s", "timeout")
        if not response.prepared:
            raise error from None
        await send(error.body)
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(server: Server, http: web.Request) -> web.Response:
    """GET /v1/models: the list of one model, or that model by its name."""
    model = dict(id=server.name, object="model", created=server.began, owned_by="nanosip")
    model["max_model_len"] = server.engine.model.config.max_seq
    if "name" not in http.match_info:
        return web.json_response({"object": "list", "data": [model]})
    if http.match_info["name"] != server.name:
        raise Refusal(404, "no such model here", "model_not_found", "model")
    return web.json_response(model)


async def serve(folder: str, host: str, port: int, batch: int, memory, device: str, parent):
    """Prints the base URL and answers until it is stopped or the process `parent` is gone."""
    key = os.environ.get("NANOSIP_API_KEY", "").strip()
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host} is reached by others: set NANOSIP_API_KEY first")
    server = Server(folder, batch, device, memory and int(memory * 2**30))
    how = dict(access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    runner = web.AppRunner(application(server, key), keepalive_timeout=IDLE_SECONDS, **how)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=2048).start()
    host, port = runner.addresses[0][:2]
    print(f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1", flush=True)
    working = asyncio.create_task(server.work())
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(0.5)
    working.cancel()
    await runner.cleanup()


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
    parser.add_argument("--memory", type=float, help="GiB for their caches, else half the free")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parent", type=int, help="stop when this parent process is gone")
    options = parser.parse_args(arguments)
    if options.batch < 1 or not 0 <= options.port < 65536 or (options.memory or 1) <= 0:
        parser.error("--batch from 1, --port from 0 to 65535, --memory above 0")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(**vars(options)))


if __name__ == "__main__":
    command.run(main)
