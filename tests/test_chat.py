"""The teacher's client against a server that fails by plan, and against its own sudden death."""

import asyncio
import contextlib
import email.utils
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_server import CONTENT, TRANSPORT, faulty_server

from chat import MAX_BODY, Chat, Endpoint, TeacherGone
from support.command import UserError
from support.replies import Answer, Failure, read_reply
from support.store import open_file

KEY = "sk-test-0123456789abcdef"
SAMPLING = dict(temperature=1.0, top_p=1.0, max_tokens=64)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def client():
    """Chat, closed at the end of the test; every close must be quick and end the thread."""
    opened = []

    def open_chat(url, **kwargs):
        opened.append(Chat(url, "model", **kwargs))
        return opened[-1]

    yield open_chat
    for chat in opened:
        began = time.monotonic()
        chat.close()
        assert time.monotonic() - began < 2 and not chat._thread.is_alive()


def ask_all(chat, prompts, seed=0):
    async def gather():
        asks = [chat.ask(prompt, seed=seed, **SAMPLING) for prompt in prompts]
        return await asyncio.gather(*asks, return_exceptions=True)

    return chat.run(gather()).result(timeout=60)


def ask(chat, prompt="question", seed=0):
    return chat.run(chat.ask(prompt, seed=seed, **SAMPLING)).result(timeout=60)


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_answers_do_not_depend_on_faults(client, tmp_path):
    prompts = [f"question {i}" for i in range(300)]
    with faulty_server(share=0.3, seed=1) as server:
        chat = client(server.url, timeout=2.0, retries=12, cache=tmp_path / "cache.sqlite")
        answers = ask_all(chat, prompts)
        assert [a.text for a in answers] == [f"answer to {p}" for p in prompts]
        stats, counts = chat.stats(), server.counts
    assert set(counts) == {*TRANSPORT, "answer"}
    kinds = {"hang": "timeout", "slow": "timeout", "reset": "connection", "huge": "too_large"}
    expected = {}
    for fault in TRANSPORT:
        kind = kinds.get(fault, fault.removesuffix("_retry_after"))
        expected[kind] = expected.get(kind, 0) + counts[fault]
    assert stats["failed"] == expected
    assert stats["calls"] == sum(counts.values()) and stats["dropped"] == 0
    assert stats["retries"] == stats["calls"] - len(prompts)
    assert stats["tokens_in"] == 7 * len(prompts) and stats["tokens_out"] == 3 * len(prompts)


@pytest.mark.parametrize("kind", sorted({*CONTENT} - {"nonsense"}))
def test_a_reply_without_an_answer_is_none_counted_and_asked_again(client, tmp_path, kind):
    with faulty_server(plan=[kind], share=1.0) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        assert ask(chat) == Answer(None, kind, 7, 3)
        server.share = 0.0
        assert ask(chat) == Answer("answer to question", "stop", 7, 3)
        assert ask(chat) == Answer("answer to question", "stop", 7, 3, cached=True)
        assert chat.stats()["failed"] == {kind: 1} and chat.stats()["calls"] == 2


def reply_of(message, finish="stop", **rest):
    return {"choices": [{"message": message, "finish_reason": finish}], **rest}


def test_nothing_that_is_no_completion_is_an_answer():
    usage = {"prompt_tokens": -1, "completion_tokens": float("inf")}
    odd = reply_of({"content": "lone \ud800, null \u0000, \u202e"}, None, usage=usage)
    assert read_reply(odd) == Answer("lone ?, null \0, \u202e", "stop", 0, 0)
    for reply in [None, [], 7, {"choices": {}}, {"choices": [7]}, reply_of({"content": ["x"]})]:
        with pytest.raises(Failure):
            read_reply(reply)


def test_a_base_url_without_v1_is_hinted_at(client):
    with faulty_server(plan=["404"], share=1.0) as server:
        for url, hinted in ((server.url, False), (server.url.removesuffix("/v1"), True)):
            with pytest.raises(UserError) as raised:
                ask(client(url))
            assert ("lack /v1?" in str(raised.value)) == hinted


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422, 429])
def test_a_refusal_is_raised_at_once_and_never_shows_the_key(client, tmp_path, status):
    message = f"no such model\n\x1b[31m for Bearer {KEY} insufficient_quota " + "x" * 9000
    with faulty_server(plan=[str(status)], share=1.0, message=message) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        with pytest.raises(UserError) as raised:
            ask(chat)
        assert server.keys == {f"Bearer {KEY}"} and sum(server.counts.values()) == 1
    shown = str(raised.value)
    assert shown.startswith(f"{server.url}/chat/completions answered {status}: ")
    assert "no such model" in shown and len(shown) < 700 and shown.isprintable()
    for place in [repr(raised.value), repr(chat.stats()), *(str(vars(chat._endpoints[0])),)]:
        assert KEY not in place
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_urls():
    assert Endpoint("http://host:1/v1/").url == "http://host:1/v1/chat/completions"
    for url in ["", "host:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://["]:
        with pytest.raises(ValueError, match="looks like|Port|IPv6"):
            Endpoint(url)
    for url in [f"http://user:{KEY}@host/v1", f"{KEY}@host", f"http://host/v1?api_key={KEY}"]:
        with pytest.raises(ValueError) as raised:
            Endpoint(url)
        assert KEY not in str(raised.value)


def test_no_key_no_header(client, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with faulty_server() as server:
        assert ask(client(server.url)).text == "answer to question"
        assert not server.keys


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_for_all_requests(client, form):
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    with faulty_server(
        ["429_retry_after"], 1.0, retry_after=1.5 if form == "seconds" else date
    ) as server:
        chat = client(server.url)
        first = chat.run(chat.ask("first", seed=0, **SAMPLING))
        while not server.arrivals:
            time.sleep(0.01)
        time.sleep(0.2)
        server.share = 0.0
        ask_all(chat, [f"question {i}" for i in range(200)])
        assert first.result(timeout=10).text == "answer to first"
    pause = server.arrivals[1] - server.arrivals[0]
    assert (1.5 if form == "seconds" else 0.9) <= pause < 3.5
    assert server.arrivals[-1] - server.arrivals[1] > 0.1  # no thundering herd


def test_rate_limit_is_approached_not_rammed(client):
    with faulty_server(rate=200, retry_after=0.5) as server:
        chat = client(server.url)
        answers = ask_all(chat, [f"question {i}" for i in range(400)])
        assert all(a.text for a in answers)
    # the first burst is all refused but for 200; after that only few requests are wasted
    assert server.counts["429_retry_after"] < 300


def test_requests_move_over_and_come_back(client):
    with faulty_server() as good, faulty_server(["503"], 1.0) as bad:
        dead = f"http://127.0.0.1:{unused_port()}/v1"
        chat = client(f"{dead}, {bad.url},{good.url}", concurrency=50)
        answers = ask_all(chat, [f"question {i}" for i in range(300)])
        assert all(a.text for a in answers)
        assert good.counts["answer"] == 300 and bad.counts["503"] < 150
        bad.share, good.share = 0.0, 1.0  # now the other one fails
        good.plan = ["reset"]
        answers = ask_all(chat, [f"question {i}" for i in range(300, 600)])
        assert all(a.text for a in answers) and bad.counts["answer"] == 300


def test_equal_endpoints_share_the_load(client):
    with faulty_server(latency=0.05) as one, faulty_server(latency=0.05) as two:
        ask_all(client([one.url, two.url]), [f"question {i}" for i in range(400)])
    assert abs(one.counts["answer"] - two.counts["answer"]) <= 40


def test_a_question_that_always_fails_is_dropped_only_if_others_are_answered(client):
    def answer(request):
        if request["messages"][0]["content"] == "poison":
            raise ConnectionError
        return "fine"

    with faulty_server(answer=answer, latency=0.01) as server:
        chat = client(server.url, retries=2)
        poison, *rest = ask_all(chat, ["poison", *map(str, range(20))])
        assert poison == Answer(None, "connection", 0, 0) and all(a.text for a in rest)
        assert chat.stats()["dropped"] == 1 and chat.stats()["failed"] == {"connection": 3}


@pytest.mark.parametrize("how", ["unused port", "hang", "500", "429_retry_after"])
def test_teacher_gone(client, how):
    with faulty_server([how], 1.0, retry_after=3600) as server:
        url = f"http://127.0.0.1:{unused_port()}/v1" if how == "unused port" else server.url
        chat = client(url, give_up_after=1.0, timeout=0.5, retries=1)
        began = time.monotonic()
        answers = ask_all(chat, [str(i) for i in range(100)])
        assert 0.9 < time.monotonic() - began < 3
    assert all(isinstance(a, TeacherGone) for a in answers)
    assert "no answer for 1 s" in str(answers[0]) and url in str(answers[0])


def test_a_pause_of_the_run_is_not_silence_of_the_teacher(client):
    with faulty_server() as server:
        chat = client(server.url, give_up_after=0.5)
        ask(chat, "one")
        time.sleep(0.7)
        server.share, server.plan = 1.0, ["500"]
        threading.Timer(0.2, lambda: setattr(server, "share", 0.0)).start()
        assert ask(chat, "two").text


def test_equal_questions_in_flight_are_asked_once(client):
    with faulty_server(latency=0.2) as server:
        chat = client(server.url)
        answers = ask_all(chat, ["question"] * 50)
        assert {a.text for a in answers} == {"answer to question"}
        assert sum(a.cached for a in answers) == 49 == chat.stats()["cached"]
        assert server.counts["answer"] == 1
        ask(chat, seed=1)
        assert server.counts["answer"] == 2


def test_cancelling_one_asker_harms_no_other(client, tmp_path):
    with faulty_server(latency=0.3) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        first, second = (chat.run(chat.ask("q", seed=0, **SAMPLING)) for _ in range(2))
        time.sleep(0.1)
        first.cancel()
        assert second.result(timeout=5).text and server.counts["answer"] == 1


def test_a_thousand_in_flight(client):
    with faulty_server(latency=1.5) as server:
        answers = ask_all(client(server.url), [str(i) for i in range(1100)])
        assert all(a.text for a in answers) and 1000 <= server.peak <= 1024


def test_a_full_disk_is_told_to_whoever_asked(client, tmp_path):
    with faulty_server() as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        chat.store._db.execute("PRAGMA max_page_count=5")
        answers = ask_all(chat, [f"question {i}" for i in range(1000)])
    assert any(isinstance(a, sqlite3.Error) and "full" in str(a) for a in answers)


def test_body_is_read_only_to_the_limit(client):
    with faulty_server(["huge"], 1.0) as server:
        chat = client(server.url, give_up_after=1.0)
        with pytest.raises(TeacherGone, match="more than 2 MB"):
            ask(chat)
    assert MAX_BODY <= 16 << 20


SCRIPT = """
import asyncio, sys
from chat import Chat
url, cache = sys.argv[1:]
chat = Chat(url, "model", cache=cache, concurrency=100)
async def one(i):
    answer = await chat.ask(f"question {i}", seed=0, temperature=1.0, top_p=1.0, max_tokens=64)
    print(i, answer.text, flush=True)
async def every():
    await asyncio.gather(*map(one, range(400)))
try:
    chat.run(every()).result()
finally:
    chat.close()
"""


def start(server, cache):
    command = [sys.executable, "-c", SCRIPT, server.url, str(cache)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
        # A shell that runs the tests in the background has children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stored_answers(cache):
    with contextlib.closing(sqlite3.connect(cache)) as db:
        return db.execute("SELECT count(*) FROM answers").fetchone()[0]


def test_kill_loses_no_answered_question(tmp_path):
    cache, rng, printed = tmp_path / "cache.sqlite", random.Random(0), set()
    with faulty_server(latency=0.1) as server:
        for _ in range(3):
            process = start(server, cache)
            printed.update(process.stdout.readline() for _ in range(rng.randrange(20, 150)))
            process.kill()
            printed.update(process.communicate()[0].splitlines(keepends=True))
            stored = stored_answers(cache)
            assert len(printed) <= stored < 400
        before = server.counts["answer"]
        out, _ = start(server, cache).communicate(timeout=30)
        assert set(out.splitlines()) == {f"{i} answer to question {i}" for i in range(400)}
        assert server.counts["answer"] - before == 400 - stored


def test_control_c_ends_within_two_seconds_with_nothing_lost(tmp_path):
    cache = tmp_path / "cache.sqlite"
    with faulty_server(plan=["hang"], share=0.2) as server:
        process = start(server, cache)
        for _ in range(100):
            process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, error = process.communicate(timeout=10)
        assert time.monotonic() - began < 2 and "KeyboardInterrupt" in error
        assert KEY not in error and not re.search("never retrieved|was destroyed", error)
        assert len(out.splitlines()) <= stored_answers(cache) <= server.counts["answer"]


def test_processes_may_open_a_new_store_at_once(tmp_path):
    """Three at a time: SQLite's own waiting does not cover the change to WAL mode."""
    together = threading.Barrier(3)

    def open_all(_):
        for i in range(100):
            together.wait(10)
            open_file(tmp_path / str(i)).close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_all, range(3)))
