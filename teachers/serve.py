"""A checkpoint as an OpenAI-compatible server: small teachers, tests, trying out.

    python serve.py CKPT --port 8000        prints http://127.0.0.1:8000/v1, then serves

CKPT is any folder that model.py reads. /v1/chat/completions, /v1/completions and /v1/models answer
as the official `openai` client expects, streaming, n, stop, seed and logprobs included; any model
name is taken. Requests are batched as they come (engine.py). The same seed gives the same answer.

Chats are laid out by the folder's own template (chat_template.jinja, or in tokenizer_config.json);
without one the messages are joined by newlines into a plain prompt. Only the template can write
special tokens: text that spells one, in a message or a prompt, stays text.

It listens to this machine alone unless told otherwise; NANOSIP_API_KEY, if set, is the key that
clients must show. People with GPUs want vLLM, which is many times faster and takes far more models.
"""

import argparse
import asyncio
import codecs
import contextlib
import functools
import hmac
import json
import logging
import os
import secrets
import sys
import time

import torch
from aiohttp import web
from jinja2 import TemplateError

from kernels.packed import packed_weights
from rollout import uniforms
from support.command import python, running
from support.hub import local_folder
from teachers.engine import Row, certain, load_engine, plain
from teachers.template import Template

MAX_BODY = 4 << 20  # bytes of a request
MAX_ANSWERS = 4096  # answers being computed or waiting, over all requests
MAX_TOKENS = 1 << 24  # that one request may ask for
MAX_SECONDS = 600.0  # for one request
IDLE_SECONDS = 30.0  # until the whole head of a request is there
MAX_TOP = 20  # alternatives reported beside a token

# What would change the answer and is not supported, with the values that would not.
UNSUPPORTED = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "top_k": (0, -1),
}


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


def messages_of(body: dict) -> list[dict]:
    """[{"role", "content"}], content as one string."""
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise Refusal(400, "messages must be a list of at least one message", param="messages")
    messages = []
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refusal(400, f"{where} must be an object", param=where)
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            what = f"{where}.role must be system, developer, user or assistant"
            raise Refusal(400, what, param=f"{where}.role")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else 0
        if content is None:
            content = ""
        if not isinstance(content, str):
            what = f"{where}.content must be text or a list of text parts"
            raise Refusal(400, what, param=f"{where}.content")
        messages.append({"role": role, "content": content})
    return messages


def prompts_of(body: dict, tokenizer, vocabulary: int) -> list[list[int]]:
    """The token ids of each prompt: a string, token ids, or a list of either."""
    found = body.get("prompt", "")
    found = [found] if isinstance(found, str) or is_ids(found, vocabulary) else found
    if not isinstance(found, list) or not found:
        raise Refusal(400, "prompt must be a string, token ids, or a list of these", param="prompt")
    prompts = []
    for prompt in found:
        if isinstance(prompt, str):
            prompts.append(plain(tokenizer, prompt))
        elif is_ids(prompt, vocabulary):
            prompts.append(prompt)
        else:
            what = f"prompt: neither a string nor ids below {vocabulary}: {str(prompt)[:60]}"
            raise Refusal(400, what, param="prompt")
    return prompts


def is_ids(found, vocabulary: int) -> bool:
    whole = isinstance(found, list) and found and all(type(i) is int for i in found)
    return whole and min(found) >= 0 and max(found) < vocabulary


def number(body: dict, name: str, default, low, high, kind=int):
    """body[name] as `kind` (int or float), default where absent or null; Refusal 400 unless it is
    a number from low to high, and a whole one where an int is asked for."""
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high or kind(value) != value:
        article = "an integer" if kind is int else "a number"
        raise Refusal(400, f"{name} must be {article} from {low} to {high}", param=name)
    return kind(value)


def flag(body: dict, name: str) -> bool:
    """body[name], False where absent or null; Refusal 400 for what is no boolean."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refusal(400, f"{name} must be true or false", param=name)
    return bool(value)


class Request:
    """A checked request, and its answers as Rows: sample k of prompt i is row i * n + k."""

    def __init__(self, body: dict, chat: bool, server: "Server"):
        for name, neutral in UNSUPPORTED.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise Refusal(400, f"{name} is not supported", "unsupported_parameter", name)
        self.chat, self.news, config = chat, asyncio.Event(), server.engine.model.config
        self.stream = flag(body, "stream")
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise Refusal(400, "stream_options must be an object", param="stream_options")
        self.usage = flag(options, "include_usage")
        self.echo = not chat and flag(body, "echo")
        self.deadline = time.monotonic() + MAX_SECONDS
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created, n = int(time.time()), number(body, "n", 1, 1, 128)
        if chat:
            self.prompts = [server.encode(messages_of(body))]
            wants = flag(body, "logprobs")
            top = number(body, "top_logprobs", 0, 0, MAX_TOP) if wants else None
        else:
            self.prompts = prompts_of(body, server.tokenizer, config.vocab_size)
            top = number(body, "logprobs", None, 0, MAX_TOP)
        sampling = dict(
            temperature=number(body, "temperature", 1.0, 0, 2, float),
            top_p=max(number(body, "top_p", 1.0, 0, 1, float), 1e-6),
            stop=stops_of(body),
            top=None if top is None else min(top, config.vocab_size),
            score=self.echo and top is not None,
        )
        if sampling["temperature"] < 1e-4:
            sampling["temperature"] = 0.0  # greedy
        seed = number(body, "seed", secrets.randbits(63), -(2**63), 2**64 - 1)
        tokens = self.most_tokens(body, config.max_seq)
        if (count := n * len(self.prompts)) > MAX_ANSWERS:
            raise Refusal(400, f"{count} answers in one request, the most is {MAX_ANSWERS}")
        if count * tokens > MAX_TOKENS:
            raise Refusal(400, f"{count} answers of {tokens} tokens are above {MAX_TOKENS} in all")
        u = uniforms(seed, torch.arange(len(self.prompts)), n, tokens).flatten(0, 1).numpy()
        self.rows = [Row(tuple(self.prompts[i // n]), u[i], **sampling) for i in range(len(u))]

    def most_tokens(self, body: dict, max_seq: int) -> int:
        """Of one answer: as asked for; else 16, and of a chat whatever there is room for."""
        longest = max(map(len, self.prompts))
        room, limit = max_seq - longest, "max_tokens"
        if body.get("max_completion_tokens") is not None:
            limit = "max_completion_tokens"
        tokens = number(body, limit, None, 0 if self.echo else 1, 2**31)
        tokens = (max(room, 1) if self.chat else 16) if tokens is None else tokens
        if tokens > room:
            what = f"This model's maximum context length is {max_seq} tokens. "
            what += f"However, the prompt has {longest} and {tokens} were requested."
            raise Refusal(400, what, "context_length_exceeded", limit)
        return tokens


def stops_of(body: dict) -> tuple[str, ...]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    few = isinstance(stop, list) and len(stop) <= 16
    if not few or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stop):
        raise Refusal(400, "stop must be a string or a list of up to 16 strings", param="stop")
    return tuple(stop)


# --- The answer ----------------------------------------------------------------------------------


class Server:
    """Requests to the engine, and its answers in OpenAI's shapes."""

    def __init__(self, folder: str, size: int, device: str):
        self.engine, self.tokenizer = load_engine(folder, size, device)
        self.template = Template(local_folder(folder, weights=False), self.tokenizer)
        self.name, self.began = folder, int(time.time())
        self.names = {i: name for name, i in self.tokenizer.specials.items()}
        self.requests, self.wake = {}, asyncio.Event()  # of every row in the engine, by its id()

    def encode(self, messages: list[dict]) -> list[int]:
        try:
            return self.template.encode(messages)
        except TemplateError as error:
            raise Refusal(400, str(error), param="messages") from None

    async def work(self):
        """Steps of the engine, in a thread of their own, as long as somebody waits."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.engine.load:
                try:
                    rows = await asyncio.to_thread(self.engine.step)
                except Exception:
                    logging.exception("a step of the model failed")
                    self.engine.clear()
                    rows = [row for request in self.requests.values() for row in request.rows]
                    for row in rows:
                        row.finish = row.finish or "error"
                for row in rows:
                    request = self.requests.get(id(row))
                    if request and (row.finish or request.stream):
                        request.news.set()

    @contextlib.contextmanager
    def working_on(self, request: Request):
        """Its rows are in the engine until the answer is there or nobody wants it any more."""
        if self.engine.load + len(request.rows) > MAX_ANSWERS:
            raise Refusal(429, "too many answers are being waited for, try again", "overloaded")
        self.requests.update((id(row), request) for row in request.rows)
        self.engine.waiting.extend(request.rows)
        self.wake.set()
        try:
            yield
        finally:
            for row in request.rows:
                row.gone = True
                del self.requests[id(row)]

    async def progress(self, request: Request):
        """Until some row has gone on."""
        left = request.deadline - time.monotonic()
        try:
            await asyncio.wait_for(request.news.wait(), left)
        except asyncio.TimeoutError:
            raise Refusal(504, f"no answer within {MAX_SECONDS:.0f} s", "timeout") from None
        request.news.clear()
        if any(row.finish == "error" for row in request.rows):
            raise Refusal(500, "the model failed; the server's log says why", "internal_error")

    def choice(self, request: Request, i: int, told=(0, 0)) -> tuple[dict, tuple[int, int]]:
        """What row i says beyond the (characters, tokens) told already; how many are told now."""
        row = request.rows[i]
        finish = row.finish  # read first: the engine works on meanwhile
        ids = row.ids[: len(row.ids if row.top is None else row.logprobs)]
        text = certain(self.tokenizer.decode(ids), row.stop, finish is not None)
        tokens = None if row.top is None else list(zip(ids, row.logprobs, strict=False))
        if request.echo:
            text = self.tokenizer.decode(row.prompt) + text
            if tokens is not None:
                tokens = [*zip(row.prompt, [None, *row.prompt_logprobs], strict=True), *tokens]
        logprobs, new = self.logprobs(request, tokens, told[1]), text[told[0] :]
        choice = {"index": i, "logprobs": logprobs, "finish_reason": finish}
        if not request.chat:
            choice["text"] = new
        elif request.stream:
            choice["delta"] = {"content": new} | ({"role": "assistant"} if told == (0, 0) else {})
        else:
            choice["message"] = {"role": "assistant", "content": new, "refusal": None}
        return choice, (len(text), len(tokens or ()))

    async def complete(self, request: Request) -> dict:
        with self.working_on(request):
            while not all(row.finish for row in request.rows):
                await self.progress(request)
        choices = [self.choice(request, i)[0] for i in range(len(request.rows))]
        return self.envelope(request, choices) | {"usage": usage(request)}

    async def stream(self, request: Request, send):
        """Chunks for `send`: whatever text of a row is certain, and the rest with its end."""
        told = dict.fromkeys(range(len(request.rows)), (0, 0))
        no_usage = {"usage": None} if request.usage else {}
        with self.working_on(request):
            while told:
                await self.progress(request)
                for i, before in list(told.items()):
                    choice, now = self.choice(request, i, before)
                    if now[0] == before[0] and not choice["finish_reason"]:
                        continue
                    await send(self.envelope(request, [choice]) | no_usage)
                    told[i] = now
                    if choice["finish_reason"]:
                        del told[i]
        if request.usage:
            await send(self.envelope(request, []) | {"usage": usage(request)})

    def envelope(self, request: Request, choices: list) -> dict:
        kind = "text_completion"
        if request.chat:
            kind = "chat.completion.chunk" if request.stream else "chat.completion"
        named = dict(id=request.id, object=kind, created=request.created, model=self.name)
        return named | {"choices": choices}

    def logprobs(self, request: Request, tokens, told: int) -> dict | None:
        """Of tokens [(id, (log p, alternatives) or None)] from number `told` on."""
        if tokens is None:
            return None
        if request.chat:
            content = [
                self.token(i, p) | {"top_logprobs": [self.token(*pair) for pair in best]}
                for i, (p, best) in tokens[told:]
            ]
            return {"content": content, "refusal": None}
        decoder, offsets, offset = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        for i, _ in tokens:
            offsets.append(offset)
            offset += len(decoder.decode(self.bytes_of(i)))
        # the token itself is among its alternatives, likely or not
        top = [
            known and {self.spell(j): p for j, p in [(i, known[0]), *known[1]]}
            for i, known in tokens
        ]
        return {
            "tokens": [self.spell(i) for i, _ in tokens][told:],
            "token_logprobs": [known and known[0] for _, known in tokens][told:],
            "top_logprobs": top[told:],
            "text_offset": offsets[told:],
        }

    def token(self, i: int, logprob: float) -> dict:
        return {"token": self.spell(i), "logprob": logprob, "bytes": list(self.bytes_of(i))}

    def bytes_of(self, i: int) -> bytes:
        known = getattr(self.tokenizer, "token_bytes", None)
        if known is None or i >= len(known):
            return self.tokenizer.decode([i]).encode()
        return known[i]

    def spell(self, i: int) -> str:
        """A token for the eye: its text, its name, or its bytes where these are no text."""
        if i in self.names:
            return self.names[i]
        try:
            return self.bytes_of(i).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(i))


def usage(request: Request) -> dict:
    read, written = sum(map(len, request.prompts)), sum(row.sampled for row in request.rows)
    return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


# --- HTTP ----------------------------------------------------------------------------------------


def application(server: Server, key: str) -> web.Application:
    """key: what clients must show, or empty."""

    @web.middleware
    async def guard(http: web.Request, handler):
        """Whatever goes wrong becomes an error in OpenAI's shape; nothing takes forever."""
        loop = asyncio.get_running_loop()
        end = lambda: http.transport and http.transport.abort()  # noqa: E731
        abort = loop.call_later(1.1 * MAX_SECONDS, end)
        try:
            shown = http.headers.get("Authorization", "").encode(errors="replace")
            if key and not hmac.compare_digest(shown, f"Bearer {key}".encode()):
                raise Refusal(401, "wrong or missing API key", "invalid_api_key")
            return await handler(http)
        except Refusal as refusal:
            return refusal.response()
        except ConnectionError:  # the client has left
            raise
        except web.HTTPException as error:  # no such path, wrong method, body too large
            code = error.reason.lower().replace(" ", "_")
            return Refusal(error.status, f"{error.reason}: {http.path[:100]}", code).response()
        except Exception:
            logging.exception("a request failed")
            return Refusal(500, "the server failed; its log says why", "internal_error").response()
        finally:
            abort.cancel()

    app = web.Application(client_max_size=MAX_BODY, middlewares=[guard])
    app.router.add_post("/v1/chat/completions", functools.partial(answer, server))
    app.router.add_post("/v1/completions", functools.partial(answer, server))
    app.router.add_get("/v1/models", functools.partial(models, server))
    app.router.add_get("/v1/models/{name:.+}", functools.partial(models, server))
    return app


async def answer(server: Server, http: web.Request) -> web.StreamResponse:
    """Of both kinds of completions."""
    try:
        body = json.loads(await http.read())
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    request = Request(body, http.path == "/v1/chat/completions", server)
    if not request.stream:
        return web.json_response(await server.complete(request))
    response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
    response.content_type = "text/event-stream"

    async def send(data: dict):
        if not response.prepared:
            await response.prepare(http)
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    try:
        await server.stream(request, send)
    except Refusal as refusal:
        if not response.prepared:
            raise
        await send(refusal.body)
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(server: Server, http: web.Request) -> web.Response:
    """The list of one model, or that model by its name."""
    model = dict(id=server.name, object="model", created=server.began, owned_by="nanosip")
    model["max_model_len"] = server.engine.model.config.max_seq
    if "name" not in http.match_info:
        return web.json_response({"object": "list", "data": [model]})
    if http.match_info["name"] != server.name:
        raise Refusal(404, "no such model here", "model_not_found", "model")
    return web.json_response(model)


async def serve(folder: str, host: str, port: int, batch: int, device: str, parent: int | None):
    """Prints the base URL and answers until it is stopped or the process `parent` is gone."""
    key = os.environ.get("NANOSIP_API_KEY", "").strip()
    if host not in ("127.0.0.1", "::1", "localhost") and not key:
        raise ValueError(f"--host {host} is reached by others: set NANOSIP_API_KEY first")
    server = Server(folder, batch, device)
    how = dict(access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    runner = web.AppRunner(application(server, key), keepalive_timeout=IDLE_SECONDS, **how)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=2048).start()
    host, port = runner.addresses[0][:2]
    print(f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1", flush=True)
    with packed_weights(server.engine.model):
        working = asyncio.create_task(server.work())
        while parent is None or os.getppid() == parent:
            await asyncio.sleep(0.5)
    working.cancel()
    await runner.cleanup()


def start_server(folder, batch: int = 64):
    """Context manager: a server of the folder in a process of its own; gives its base URL."""
    command = python("teachers.serve", folder, f"--batch={batch}")
    return running([*command, "--port=0", f"--parent={os.getpid()}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a checkpoint of ours, or a Llama-family folder")
    parser.add_argument("--host", default="127.0.0.1", help="beyond this machine only with a key")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--batch", type=int, default=64, help="answers sampled at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parent", type=int, help="stop when this parent process is gone")
    options = parser.parse_args()
    if options.batch < 1:
        parser.error("--batch is at least 1")
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(serve(**vars(options)))
        except (ValueError, OSError, OverflowError, RuntimeError) as error:  # of folder or port
            sys.exit(f"serve.py: {error}")


if __name__ == "__main__":
    main()
