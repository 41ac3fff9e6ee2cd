"""A teacher that fails by a seeded plan: what networks, proxies and servers do to a long run.

    with faulty_server(share=0.3, seed=0, answer=lambda request: "VERDICT: A") as server:
        Chat(server.url, "any model") ...
        server.counts  # replies by kind, "answer" for the good ones

Whether a request fails, and how, depends on the seed, on its body and on how often this body has
been seen, not on the order of arrival. It speaks HTTP on bare sockets, because half of the faults
are things that an HTTP library refuses to do; it runs in a thread of the calling process.
"""

import asyncio
import collections
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time

from world import teacher

# faults that a client can only overcome by asking again
TRANSPORT = ["hang", "slow", "reset", "half_closed", "huge"]
TRANSPORT += ["invalid_json", "malformed", "content_type", "408", "409", "429", "429_retry_after"]
TRANSPORT += ["500", "502", "503", "503_retry_after"]
# replies of a correct form that hold no usable answer, and the message and end of each
CONTENT = {
    "null": ({"content": None}, "stop"),
    "empty": ({"content": " \n"}, "stop"),
    "length": ({"content": "VERDICT:"}, "length"),
    "reasoning_only": ({"content": None, "reasoning_content": "VERDICT: A"}, "stop"),
}
JSON = {"Content-Type": "application/json"}
BROKEN = {  # kind: headers and body
    "invalid_json": (JSON, '{"choices": [{"message": {"content": "VERDICT: A'),
    "malformed": (JSON, '{"choices": []}'),
    "content_type": ({"Content-Type": "text/html"}, "<html>Please log in</html>"),
    "huge": (JSON | {"Content-Length": 100 << 20}, " " * (4 << 20)),
}


def prompt_of(request: dict) -> str:
    return request["messages"][0]["content"]


def world_teacher(request: dict) -> str:
    """An answer of the pocket world's teacher."""
    return teacher.answer(prompt_of(request), request["seed"])


class FaultyServer:
    """The options are those of `faulty_server`; they may be changed while it runs."""

    def __init__(self, options: dict):
        vars(self).update(options)
        self.counts = collections.Counter()  # replies by kind
        self.answered = collections.Counter()  # good answers by prompt
        self.seen = collections.Counter()  # requests by body
        self.requests = []  # all of them, in the order of their arrival
        self.arrivals = []  # time.monotonic() of every request
        self.accepted = collections.deque(maxlen=self.rate)  # times of the latest
        self.keys = set()  # Authorization headers
        self.open = self.peak = 0  # requests being answered, now and at most

    async def connection(self, reader, writer):
        with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                if head.startswith("GET "):  # who made it: no part of the plan, and not counted
                    models = json.dumps({"data": [{"owned_by": self.owner}]})
                    about = f"Content-Type: application/json\r\nContent-Length: {len(models)}"
                    writer.write(f"HTTP/1.1 200 OK\r\n{about}\r\n\r\n{models}".encode())
                    continue
                length = int(re.search(r"content-length: *(\d+)", head, re.I)[1])
                body = await reader.readexactly(length)
                self.arrivals.append(time.monotonic())
                self.keys.update(re.findall(r"authorization: *(.*)\r", head, re.I))
                self.open += 1
                self.peak = max(self.peak, self.open)
                try:
                    await self.reply(reader, writer, body)
                finally:
                    self.open -= 1
        writer.close()

    def kind(self, body: bytes) -> str:
        """The fault planned for this request, or "answer"."""
        if self.rate:
            now = time.monotonic()
            if len(self.accepted) == self.rate and self.accepted[0] > now - 1.0:
                return "429_retry_after"
            self.accepted.append(now)
        digest = hashlib.sha256(body).hexdigest()
        self.seen[digest] += 1
        draw = random.Random(f"{self.seed} {digest} {self.seen[digest]}")
        return draw.choice(self.plan) if draw.random() < self.share else "answer"

    async def reply(self, reader, writer, body: bytes) -> None:
        """Answers one request; raises ConnectionError if nothing may follow on the connection."""
        kind, request = self.kind(body), json.loads(body)
        self.counts[kind] += 1
        self.requests.append(request)
        if not kind.startswith("429"):
            wait = self.latency(request) if callable(self.latency) else self.latency
            await asyncio.sleep(wait)
        status, headers, content = 200, *BROKEN.get(kind, (JSON, ""))
        if kind[:3].isdigit():
            status, headers = int(kind[:3]), JSON | {"Location": "http://127.0.0.1:9/elsewhere"}
            content = json.dumps({"error": {"message": self.message or f"planned {kind}"}})
            headers |= {"Retry-After": self.retry_after} if kind.endswith("retry_after") else {}
        elif kind not in BROKEN:
            status, content = self.completion(kind, request)
        headers = {"Content-Length": len(content), **headers}
        lines = [f"HTTP/1.1 {status} planned", *(f"{k}: {v}" for k, v in headers.items())]
        await self.send(kind, reader, writer, "\r\n".join([*lines, "", content]).encode())
        if kind == "answer":
            self.answered[prompt_of(request)] += 1

    def completion(self, kind: str, request: dict) -> tuple[int, str]:
        message, finish = CONTENT.get(kind) or ({"content": self.answer(request)}, "stop")
        if isinstance(message["content"], tuple):  # a status and a body
            status, body = message["content"]
            return status, json.dumps(body)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return 200, json.dumps({"model": request["model"], "choices": [choice], "usage": usage})

    async def send(self, kind, reader, writer, content: bytes) -> None:
        if kind == "hang":
            await reader.read(1)  # until the client has had enough
            raise ConnectionError
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # close at once, with RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            raise ConnectionError
        if kind == "half_closed":
            writer.write(content[:-20])
            raise ConnectionError
        if kind == "slow":
            for byte in content:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
            return
        writer.write(content)
        await writer.drain()


@contextlib.contextmanager
def faulty_server(
    plan=tuple(TRANSPORT),  # the kinds of faults, equally likely
    share: float = 0.0,  # of requests that fail
    seed: int = 0,
    answer=lambda request: "answer to " + prompt_of(request),  # or (status, body)
    latency=0.0,  # seconds before each reply, or a function of the request that gives them
    rate: int | None = None,  # requests per second; above it: 429 with Retry-After
    retry_after: float | str = 0.1,  # value of that header
    message: str = "",  # text of error replies
    owner: str = "nanosip",  # of its models
):
    server, loop = FaultyServer(locals()), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(5)

    how = dict(backlog=4096, limit=64 << 20)
    listening = run(asyncio.start_server(server.connection, "127.0.0.1", 0, **how))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"

    async def stop():
        listening.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    try:
        yield server
    finally:
        run(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
