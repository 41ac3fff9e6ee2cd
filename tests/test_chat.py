"""The teacher's client against a server that fails by plan, and against its own sudden death."""

import asyncio
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing

import pytest
from faulty_server import CONTENT, TRANSPORT, faulty_server, prompt_of

from support.chat import Chat, TeacherGone, Traffic, greet
from support.command import ROOT, UserError
from support.endpoint import WHOLE, Answer, Endpoint, Failure, of_content, read_reply, untaken
from support.files import read_jsonl
from support.settings import nested

KEY = "sk-test-0123456789abcdef"
SAMPLING = dict(temperature=1.0, top_p=1.0, max_tokens=64)
NOBODY = "http://127.0.0.1:9/v1"  # listens there


@pytest.fixture
def client(monkeypatch):
    """Chat, closed at the end of the test; every close must be quick and end the thread."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
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
        asks = [chat.ask(str(prompt), seed=seed, **SAMPLING) for prompt in prompts]
        return await asyncio.gather(*asks, return_exceptions=True)

    return chat.run(gather()).result(timeout=60)


def ask(chat, prompt="question", seed=0):
    return chat.run(chat.ask(prompt, seed=seed, **SAMPLING)).result(timeout=60)


# ---- Failures that pass --------------------------------------------------------------------------


def test_answers_do_not_depend_on_faults(client, tmp_path):
    prompts = [f"question {i}" for i in range(300)]
    with faulty_server(share=0.3, seed=1) as server:
        chat = client(server.url, timeout=2.0, retries=12, cache=tmp_path / "cache.sqlite")
        assert [a.text for a in ask_all(chat, prompts)] == [f"answer to {p}" for p in prompts]
        stats, counts = chat.stats(), server.counts
    assert set(counts) == {*TRANSPORT, "answer"}
    kinds = {"hang": "timeout", "slow": "timeout", "reset": "connection", "huge": "too_large"}
    expected = Counter()
    for fault in TRANSPORT:
        expected[kinds.get(fault, fault.removesuffix("_retry_after"))] += counts[fault]
    assert stats["failed"] == expected
    assert stats["calls"] == sum(counts.values()) and stats["dropped"] == 0
    assert stats["retries"] == stats["calls"] - len(prompts)
    assert stats["tokens_in"] == 7 * len(prompts) and stats["tokens_out"] == 3 * len(prompts)


def test_retry_after_holds_for_all_requests(client):
    with faulty_server(["429_retry_after"], 1.0, retry_after=1.5) as server:
        chat = client(server.url)
        first = chat.run(chat.ask("first", seed=0, **SAMPLING))
        while not chat.stats()["failed"]:
            time.sleep(0.01)
        server.share = 0.0
        ask_all(chat, range(200))
        assert first.result(timeout=10).text == "answer to first"
    assert 1.5 <= server.arrivals[1] - server.arrivals[0] < 3.5
    assert server.arrivals[-1] - server.arrivals[1] > 0.1  # no thundering herd


def test_rate_limit_is_approached_not_rammed(client):
    with faulty_server(rate=200, retry_after=0.5) as server:
        assert all(a.text for a in ask_all(client(server.url, concurrency=350), range(400)))
    # the first burst is all refused but for 200; after that only few requests are wasted
    assert server.counts["429_retry_after"] < 300 and server.peak <= 350


def test_requests_move_over_and_come_back(client):
    with faulty_server() as good, faulty_server(["503"], 1.0) as bad:
        chat = client(f"{NOBODY}, {bad.url},{good.url}", concurrency=50)
        assert all(a.text for a in ask_all(chat, range(300)))
        assert good.counts["answer"] == 300 and bad.counts["503"] < 150
        bad.share, good.share, good.plan = 0.0, 1.0, ["reset"]  # now the other one fails
        assert all(a.text for a in ask_all(chat, range(300, 600))) and bad.counts["answer"] == 300


def test_a_question_that_always_fails_is_dropped_only_if_others_are_answered(client):
    def answer(request):
        if prompt_of(request) == "poison":
            raise ConnectionError
        return "fine"

    with faulty_server(answer=answer, latency=0.01) as server:
        chat = client(server.url, retries=2)
        poison, *rest = ask_all(chat, ["poison", *range(20)])
        assert poison == Answer(None, "connection", 0, 0) and all(a.text for a in rest)
        assert chat.stats()["dropped"] == 1 and chat.stats()["failed"] == {"connection": 3}


@pytest.mark.parametrize("how", ["no server", "no host", "hang", "500", "429_retry_after", "huge"])
def test_teacher_gone(client, how):
    with faulty_server([how], 1.0, retry_after=3600) as server:
        hosts = {"no server": NOBODY, "no host": "http://no.such.host.invalid/v1"}
        url = hosts.get(how, server.url)
        chat = client(url, give_up_after=1.0, timeout=0.5 if how == "hang" else 30.0, retries=1)
        began = time.monotonic()
        answers = ask_all(chat, range(10))
        assert time.monotonic() - began > 0.9
    assert all(isinstance(a, TeacherGone) for a in answers)
    told = {"no server": "connection refused", "no host": "no such host"}
    told |= {"hang": "longer than 0.5 s", "huge": "more than 2 MB"}
    assert str(answers[0]).startswith(f"no answer for 1 s: {url}: ")
    assert told.get(how, f"it answers {how[:3]}") in str(answers[0])


def test_a_pause_of_the_run_is_not_silence_of_the_teacher(client):
    with faulty_server() as server:
        chat = client(server.url, give_up_after=0.5)
        ask(chat, "one")
        time.sleep(0.7)
        server.share, server.plan = 1.0, ["500"]
        threading.Timer(0.2, lambda: setattr(server, "share", 0.0)).start()
        assert ask(chat, "two").text


SILENCE = {
    "reset": "connection reset by peer|it closes the connection before the end of an answer",
    "503": "it answers 503 .*planned 503.*",
    "hang": "it takes longer than 0.2 s",
}


@pytest.mark.parametrize("how", SILENCE)
def test_a_silent_judge_is_two_lines(client, caplog, how):
    """One when it falls silent, one when it is back; two clients of one server say it once."""
    with faulty_server([how], 1.0) as server:
        chats = [client(server.url, timeout=0.2 if how == "hang" else 60.0) for _ in range(2)]
        asked = [c.run(c.ask(str(i), seed=0, **SAMPLING)) for c in chats for i in range(30)]
        while not caplog.messages:
            time.sleep(0.05)
        time.sleep(1.0)
        server.share = 0.0
        assert all(future.result(60).text for future in asked)
    silent, back = caplog.messages
    told = rf"{server.url} does not answer: ({SILENCE[how]}); waiting until [\d:]+ .*"
    assert re.fullmatch(told, silent)
    assert back == f"{server.url} answers again"


# ---- Replies that are no answer ------------------------------------------------------------------


def reply_of(message, finish="stop", **rest):
    return {"choices": [{"message": message, "finish_reason": finish}], **rest}


@pytest.mark.parametrize("kind", CONTENT)
def test_a_reply_without_an_answer_is_none_counted_and_asked_again(client, tmp_path, kind):
    with faulty_server(plan=[kind], share=1.0) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        assert ask(chat) == Answer(None, kind, 7, 3)
        server.share = 0.0
        for cached in (False, True):
            assert ask(chat) == Answer("answer to question", "stop", 7, 3, cached)
        assert chat.stats()["failed"] == {kind: 1} and chat.stats()["calls"] == 2


BROKEN = "length abort error model_length max_tokens tool_calls function_call content_filter"
BROKEN += " insufficient_system_resource timeout cancelled repetition pause_turn SAFETY something"


def test_only_an_answer_that_is_whole_is_used_and_kept(client, tmp_path, caplog):
    whole = [None, *sorted(WHOLE), "STOP", "COMPLETE"]
    ends = [*whole, *BROKEN.split(), "content_filter: RECITATION", 7]

    def answer(request):
        return 200, reply_of({"content": "VERDICT"}, ends[int(prompt_of(request))])

    with faulty_server(answer=answer) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        answers = ask_all(chat, range(len(ends)))
        used = [end for end, answer in zip(ends, answers, strict=True) if answer.text]
        assert used == whole and sum(chat.stats()["failed"].values()) == len(ends) - len(whole)
        assert chat.stats()["failed"]["abort"] == 1
        assert chat.store.find("SELECT count(*) FROM answers") == (len(whole),)
        assert sum("ended by 'abort'" in line for line in caplog.messages) == 1
        # earlier versions kept what was broken off
        chat.store.connections[0].execute("UPDATE answers SET finish = 'abort'")
        assert not ask(chat, "0").cached


def test_what_is_an_answer_and_what_is_none():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    assert read_reply(reply_of({"content": parts})).finish == "reasoning_only"
    parts += [{"type": "text", "text": "VERDICT: "}, {"type": "text", "text": "A"}]
    assert read_reply(reply_of({"content": parts})).text == "VERDICT: A"
    reply = reply_of({"content": None, "reasoning": "VERDICT: A"})
    assert read_reply(reply) == Answer(None, "reasoning_only", 0, 0)
    usage = {"prompt_tokens": -1, "completion_tokens": float("inf")}
    odd = reply_of({"content": "lone \ud800, null \u0000, \u202e"}, None, usage=usage)
    assert read_reply(odd) == Answer("lone ?, null \0, \u202e", "stop", 0, 0)
    contents = [["x"], [{"type": "text"}], [{"type": "text", "text": None}], {"text": "x"}, 7]
    replies = [reply_of({"content": content}) for content in contents]
    for reply in [None, [], 7, {"choices": {}}, {"choices": [7]}, *replies]:
        with pytest.raises(Failure):
            read_reply(reply)


# ---- Refusals ------------------------------------------------------------------------------------


def test_refusals_are_about_the_question_or_about_us():
    """What servers say; kind null: it is about us; field: about one that is not taken."""
    for row in read_jsonl(ROOT / "tests/refusals.jsonl"):
        assert of_content(row["status"], row["told"]) == row["kind"], row
        names = ["seed", "max_tokens", "top_p", "temperature", "min_p", "top_k"]
        assert untaken(row["status"], row["told"], names) == row.get("field"), row


def test_a_refused_question_is_an_absent_answer_and_never_a_dead_end(client, tmp_path, caplog):
    """A third is refused at once while the others take their time, as behind a content filter;
    a second process, for which only the refused ones are left, ends neither."""
    told = 400, {"error": {"code": "content_filter", "message": "The prompt was filtered"}}

    def answer(request):
        return "fine" if int(prompt_of(request)) % 3 else told

    with faulty_server(answer=answer, latency=lambda r: 0.3 * (int(prompt_of(r)) % 3)) as server:
        for process in range(2):
            chat = client(server.url, cache=tmp_path / "cache.sqlite")
            answers = ask_all(chat, range(120))
            assert [a.refused for a in answers] == [i % 3 == 0 for i in range(120)]
            assert answers[0] == Answer(None, "content_filter", 0, 0, refused=True)
            assert chat.stats()["failed"] == {"content_filter": 40}
            assert chat.stats()["calls"] == (120, 40)[process]
            assert sum("The prompt was filtered" in line for line in caplog.messages) == 1 + process
            chat.close()


def test_refusals_that_become_the_rule_end_the_run(client):
    refuse = threading.Event()

    def answer(request):
        return (400, {"error": {"message": "Bad luck"}}) if refuse.is_set() else "fine"

    with faulty_server(answer=answer) as server:
        chat = client(server.url, concurrency=4)
        ask_all(chat, range(15))
        refuse.set()
        found = [type(a) for a in ask_all(chat, range(100, 160))]
        assert found.count(Answer) >= 15 and found.count(UserError) >= 30
        with pytest.raises(UserError, match="questions were refused: .*answered 400: .*Bad luck"):
            ask(chat, "one more")
        with pytest.raises(UserError, match="answered 400"):
            greet(client(server.url), "The first question of a run, which nobody can mind.")


@pytest.mark.parametrize("status", [301, 400, 404, 429])
def test_a_refusal_of_us_is_raised_at_once_and_never_shows_the_key(client, tmp_path, status):
    message = f"no such model\n\x1b[31m for Bearer {KEY} insufficient_quota " + "x" * 9000
    with faulty_server(plan=[str(status)], share=1.0, message=message) as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        with pytest.raises(UserError) as raised:
            ask(chat)
        assert server.keys == {f"Bearer {KEY}"} and sum(server.counts.values()) == 1
        if status == 404:
            with pytest.raises(UserError, match=r"lack /v1\?"):
                ask(client(server.url.removesuffix("/v1")))
    shown = str(raised.value)
    assert shown.startswith(f"{server.url}/chat/completions answered {status}: ")
    assert "lack /v1?" not in shown and "no such model" in shown
    assert len(shown) < 700 and shown.isprintable()
    for place in [repr(raised.value), repr(chat.stats()), str(vars(chat._endpoints[0]))]:
        assert KEY not in place
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_errors_with_status_200(client):
    """As OpenRouter's gateway has them."""
    busy = [(200, {"error": {"code": 502}}), (200, {"error": {"code": 403, "message": "flagged"}})]
    with faulty_server(answer=lambda _: busy.pop(0)) as server:
        chat = client(server.url)
        assert ask(chat).finish == "content_filter"
        assert chat.stats()["failed"] == {"content_filter": 1, "502": 1}


# ---- The dialect of a server ---------------------------------------------------------------------


def test_fields_that_are_not_taken_are_sent_otherwise_and_said_once(client, caplog):
    """As OpenAI's reasoning models and Mistral have it; 60 questions at once meet with it."""
    refused = ["max_tokens", "seed", "random_seed", "temperature"]

    def answer(request):
        if found := [name for name in refused if name in request]:
            error = dict(message=f"Unsupported parameter: '{found[0]}'", param=found[0])
            return 400, {"error": error}
        return 'the text: "max_tokens": 7'

    with faulty_server(answer=answer) as server:
        for chat in (client(server.url), client(server.url)):
            assert all(a.text for a in ask_all(chat, range(60)))
            calls = chat.stats()["calls"]
            assert all(a.text for a in ask_all(chat, range(60, 120)))
            assert chat.stats()["calls"] == calls + 60 and chat.stats()["failed"] == {}
    expected = {"model", "messages", "max_completion_tokens", "top_p"}
    taken = [request for request in server.requests if not set(refused) & set(request)]
    assert all(set(request) == expected for request in taken)
    instead = {"max_tokens": "sent as max_completion_tokens", "seed": "sent as random_seed"}
    said = [f"{server.url}: model does not take {name}: it is " for name in refused]
    said = [line + instead.get(name, "left out") for line, name in zip(said, refused, strict=True)]
    assert sorted(caplog.messages) == sorted(said)


def test_a_field_that_the_user_adds_is_never_left_out(client):
    told = {"error": {"message": "Unsupported parameter: 'top_k'"}}
    with faulty_server(answer=lambda _: (400, told)) as server:
        with pytest.raises(UserError, match="Unsupported parameter: 'top_k'"):
            ask(client(server.url, extra=nested("top_k=20")))
        assert server.counts.total() == 1


BY_CONFIG = dict(top_k=-1, min_p=0.0, repetition_penalty=1.0)
BY_DEFAULT = dict(top_k=0, min_p=0.0, repeat_penalty=1.0)
KINDS = dict(vllm=BY_CONFIG, sglang=BY_CONFIG, llamacpp=BY_DEFAULT, me=BY_DEFAULT, nanosip={})


@pytest.mark.parametrize("owner", [*KINDS, "library"])
def test_sampling_is_made_neutral_where_the_server_is_known(client, caplog, tmp_path, owner):
    """And neither that nor the server's dialect is part of what a stored answer is found by."""
    with faulty_server(owner=owner) as server:
        greet(client(server.url), "Are you there?")
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        ask(chat)
        (key,) = chat.store.find("SELECT hex(key) FROM answers")
    assert key == "940EE886670712125E8F2D5B91DB8784D697FF87F0C5398991C9974A83172ABA"
    asked = dict(SAMPLING, model="model", messages=[dict(role="user", content="question")], seed=0)
    assert server.requests[-1] == asked | KINDS.get(owner, {})
    assert ["may sample with" in line for line in caplog.messages] == [True] * (owner == "library")


def test_fields_of_ones_own(client, tmp_path, caplog):
    text = "reasoning_effort=low,chat_template_kwargs.enable_thinking=false,top_k=20,seed=null"
    text += ',max_completion_tokens=4096,stop=["\\n", "a,b"]'
    own = nested(text)
    assert own["chat_template_kwargs"] == {"enable_thinking": False}
    assert own["stop"] == ["\n", "a,b"]
    with faulty_server(owner="vllm") as server:
        cache = tmp_path / "cache.sqlite"
        for extra, cached in ((own, False), ({}, False), (own, True)):
            assert ask(client(server.url, extra=extra, cache=cache)).cached == cached
    sent = dict(own, min_p=0.0, repetition_penalty=1.0, temperature=1.0, top_p=1.0)
    del sent["seed"]
    assert {k: v for k, v in server.requests[0].items() if k not in ("model", "messages")} == sent
    for wrong in ("low", "=low", "a=", "a=1,a.b=2", "a..b=1"):
        with pytest.raises(UserError, match="write field=value"):
            nested(wrong)
    assert nested("") == {} and nested("a=1 , b=x ,") == {"a": 1, "b": "x"}


# ---- Where it asks, and one answer for one question ----------------------------------------------


def test_urls():
    assert Endpoint("http://host:1/v1/").url == "http://host:1/v1/chat/completions"
    hosts = ("api.openai.com", "me.openai.azure.com", "api.mistral.ai")  # need not be asked
    assert all(Endpoint(f"https://{host}/v1").neutral == {} for host in hosts)
    wrong = ["", "host:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://["]
    for url in [*wrong, "http://my host/v1", "http://a..b/v1"]:
        with pytest.raises(UserError, match="looks like"):
            Endpoint(url)
    for url in [f"http://user:{KEY}@host/v1", f"{KEY}@host", f"http://host/v1?api_key={KEY}"]:
        with pytest.raises(UserError, match="^(?!.*sk-test)"):
            Endpoint(url)


def test_proxies_are_those_of_the_environment_and_never_for_this_machine(client, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with faulty_server() as server:  # as a proxy it answers for any host
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "near.example,10.0.0.0/8")
        monkeypatch.delenv("OPENAI_API_KEY")
        assert ask(client("http://judge.example/v1")).text and server.counts["answer"] == 1
        assert not server.keys, "no key, no header"
    hosts = ("127.0.0.1:9", "127.1.2.3", "localhost:8000", "[::1]:8000", "near.example", "10.2.3.4")
    for url in [*(f"http://{host}/v1" for host in hosts), "https://judge.example/v1"]:
        assert Endpoint(url).proxy is None
    monkeypatch.setenv("all_proxy", "socks5://proxy.example:1080")
    with pytest.raises(UserError, match="socks5 proxy"):
        Endpoint("https://judge.example/v1")


def test_equal_questions_in_flight_are_asked_once(client):
    with faulty_server(latency=0.3) as server:
        chat = client(server.url)
        gives_up = chat.run(chat.ask("question", seed=0, **SAMPLING))
        time.sleep(0.1)
        gives_up.cancel()  # and harms no other
        answers = ask_all(chat, ["question"] * 50)
        assert {a.text for a in answers} == {"answer to question"}
        assert sum(a.cached for a in answers) == 50 == chat.stats()["cached"]
        assert server.counts["answer"] == 1
        ask(chat, seed=1)
        assert server.counts["answer"] == 2


def test_traffic_is_what_happened_since_the_last_call(client):
    with faulty_server() as server:
        chats = [client(server.url), client(server.url)]
        traffic = Traffic(chats)
        for n in (3, 2):
            for chat in chats:
                ask_all(chat, [f"{n} {i}" for i in range(n)])
            found = traffic.since_last()
            assert found["judge.requests"] == (2 * n, 0) and found["judge.tokens"] == (20 * n, 0)
            assert found["judge.latency_p99"][0] > 0


def test_a_full_disk_is_told_to_whoever_asked(client, tmp_path):
    with faulty_server() as server:
        chat = client(server.url, cache=tmp_path / "cache.sqlite")
        chat.store.connections[0].execute("PRAGMA max_page_count=8")
        answers = ask_all(chat, range(1000))
    assert any(isinstance(a, sqlite3.Error) and "full" in str(a) for a in answers)


# ---- The death of the process --------------------------------------------------------------------

SCRIPT = """
import asyncio, sys
from support.chat import Chat
url, cache = sys.argv[1:]
async def one(i):
    answer = await chat.ask(f"question {i}", seed=0, temperature=1.0, top_p=1.0, max_tokens=64)
    sys.stdout.write(f"{i} {answer.text}\\n")  # a line at once: the end may come at any time
    sys.stdout.flush()
async def every():
    await asyncio.gather(*map(one, range(400)))
with Chat(url, "model", cache=cache, concurrency=100) as chat:
    chat.run(every()).result()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_death_of_the_process_loses_no_answered_question(tmp_path, how):
    cache, printed = tmp_path / "cache.sqlite", set()
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    # A shell that runs the tests in the background has children ignore SIGINT.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with faulty_server(["hang"], 0.0, latency=0.1) as server:
        command = [sys.executable, "-c", SCRIPT, server.url, str(cache)]
        for lines in (150, 30):
            server.share = 0.2 if how == signal.SIGINT else 0.0
            process = subprocess.Popen(command, **options)
            printed.update(process.stdout.readline() for _ in range(lines))
            process.send_signal(how)
            out, error = process.communicate(timeout=10)
            printed.update(out.splitlines(keepends=True))
            assert how == signal.SIGKILL or "KeyboardInterrupt" in error
            assert KEY not in error and not re.search("never retrieved|was destroyed", error)
            with closing(sqlite3.connect(cache)) as db:
                (stored,) = db.execute("SELECT count(*) FROM answers").fetchone()
            assert len(printed) <= stored < 400
        server.share, before = 0.0, server.counts["answer"]
        out, _ = subprocess.Popen(command, **options).communicate(timeout=30)
        assert set(out.splitlines()) == {f"{i} answer to question {i}" for i in range(400)}
        assert server.counts["answer"] - before == 400 - stored
