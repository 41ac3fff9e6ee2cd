"""Judgments per second of chat.py and of the official `openai` client, on one local server.

`judge_client` returns one row per client, measured in turns within one run, so that whatever else
the machine does hits all of them alike. The server has its own process and answers at once: what
is measured is the client. `python bench_chat.py [n_calls]` prints the rows.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time

from chat import Chat

PROMPT = "Which of the two continuations is better? " + "The quick brown fox jumps. " * 100
ANSWER = "The first one stays closer to what was asked and does not repeat itself. " * 5
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 512}


class InstantTeacher(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, and no more of it than the two clients need."""

    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if found:
            length = int(re.search(rb"content-length: *(\d+)", head, re.I)[1])
            if len(body) >= length:
                self.received = body[length:]
                self.transport.write(self.reply)


def completion() -> bytes:
    """A reply as vLLM would send it, head included."""
    message = {"role": "assistant", "content": ANSWER + "VERDICT: A"}
    reply = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "teacher",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 700, "completion_tokens": 80, "total_tokens": 780},
    }
    body = json.dumps(reply).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def serve(pipe) -> None:
    async def main():
        InstantTeacher.reply = completion()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(InstantTeacher, "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def instant_teacher():
    """The base URL of an InstantTeacher in its own process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=[theirs], daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def with_chat(chat: Chat):
    """A function that asks n questions that were never asked before, all at once."""

    def ask(seeds) -> int:
        async def every():
            return await asyncio.gather(*(chat.ask(PROMPT, seed=s, **SAMPLING) for s in seeds))

        return sum(answer.text is not None for answer in chat.run(every()).result())

    return ask


def with_openai(client, concurrency: int, loop: asyncio.AbstractEventLoop):
    """The same with the official client as it comes."""
    message = {"role": "user", "content": PROMPT}
    slots = asyncio.Semaphore(concurrency)

    async def one(seed):
        async with slots:
            reply = await client.chat.completions.create(
                model="teacher", messages=[message], seed=seed, **SAMPLING
            )
            return reply.choices[0].message.content

    async def every(seeds):
        return await asyncio.gather(*map(one, seeds))

    return lambda seeds: sum(text is not None for text in loop.run_until_complete(every(seeds)))


def judge_client(n_calls: int = 1000, concurrency: int = 256, rounds: int = 5) -> list[dict]:
    """Rows {client, concurrency, judgments_per_second, cpu_ms_per_call, ratio to openai}."""
    import openai  # needed for this comparison only

    seen = {}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(instant_teacher())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
        plain = Chat(url, "teacher", concurrency=concurrency)
        cached = Chat(url, "teacher", concurrency=concurrency, cache=os.path.join(folder, "a"))
        peer = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        stack.callback(lambda: loop.run_until_complete(peer.close()))
        stack.callback(plain.close)
        stack.callback(cached.close)
        clients = {
            "openai": with_openai(peer, concurrency, loop),
            "chat.py": with_chat(plain),
            "chat.py, answers stored": with_chat(cached),
        }
        for turn in range(rounds + 1):  # the first one opens connections and is not counted
            for name, ask in clients.items():
                seeds = range(turn * n_calls, (turn + 1) * n_calls)
                began, cpu = time.perf_counter(), time.process_time()
                assert ask(seeds) == n_calls
                wall, cpu = time.perf_counter() - began, time.process_time() - cpu
                if turn:
                    seen.setdefault(name, []).append((n_calls / wall, 1000 * cpu / n_calls))
    rows, peer_rate = [], statistics.median(rate for rate, _ in seen["openai"])
    for name, runs in seen.items():
        rate, cpu = map(statistics.median, zip(*runs, strict=True))
        row = dict(client=name, concurrency=concurrency, judgments_per_second=rate)
        rows.append(row | dict(cpu_ms_per_call=cpu, ratio=rate / peer_rate))
    return rows


if __name__ == "__main__":
    for concurrency in (256, 1000):
        for row in judge_client(*map(int, sys.argv[1:]), concurrency=concurrency):
            print(row)
