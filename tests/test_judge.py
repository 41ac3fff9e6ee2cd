"""Verdicts are true or absent, schedules are balanced and unbiased, and chance is keyed."""

import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import closing
from dataclasses import asdict

import numpy as np
import pytest
from faulty_server import faulty_server, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from config import Config
from judge import Judge, defuse, load_prompts, render
from schedules import expected_wins, schedule
from support.chat import Chat
from support.command import ROOT, UserError
from support.endpoint import Answer
from support.files import read_jsonl
from support.settings import execute
from support.store import Store
from tools import bench_judge
from tools.replay import best, replay
from verdicts import VERDICTS, parse
from world.corpus import document
from world.teacher import teacher_at

SECTION = re.compile(r"<(\w+) ([0-9a-f]+)>\n(.*?)\n</\1 \2>", re.S)


class Teacher:
    """Stands in for Chat: `answer(sections of the prompt, seed)` gives the text."""

    def __init__(self, answer):
        self.answer, self.asked = answer, Counter()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def ask(self, prompt, *, seed, temperature, top_p, max_tokens):
        self.asked[prompt, seed] += 1
        digest = hashlib.sha256(f"{prompt}{seed}".encode(errors="replace")).digest()
        await asyncio.sleep(digest[0] % 3 / 1000)  # answers arrive out of order
        answer = self.answer({name: text for name, _, text in SECTION.findall(prompt)}, seed)
        return answer if isinstance(answer, Answer) else Answer(answer, "stop", 0, 0)


def longer(texts, seed):
    """Longer is better, and everything is safe and true."""
    if "a" in texts:
        return "Hm.\nVERDICT: " + ("A" if len(texts["a"]) > len(texts["b"]) else "B")
    if "reference" in texts:
        return '{"reasoning": "", "label": "No Hallucination"}'
    return "VERDICT: SAFE"


def score(teacher, pools, sources=None, step=0, store=None, **keys):
    sources = sources or ["rollout"] * len(pools[0])
    prefixes, references = [f"prefix {i}" for i in range(len(pools))], ["reference"] * len(pools)
    judge = Judge(teacher, Config(**{"rewards": "quality,safety"} | keys), store)
    return judge.score(step, prefixes, references, pools, sources, range(len(pools))).result(30)


# ---- Prompts and parsers -------------------------------------------------------------------------

TABLE = list(read_jsonl(ROOT / "tests/verdicts.jsonl"))
PARTS = ["VERDICT", *":AB{}\n\\[", '"label"', "<think>", "</think>", "```"]
PIECES = st.sampled_from([row["answer"] for row in TABLE] + PARTS)
ANSWERS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=9))).map("".join))


def test_verdicts_in_the_styles_of_many_models():
    wrong = [row for row in TABLE if parse(row["kind"], row["answer"]) != row["verdict"]]
    assert len(TABLE) >= 200 and not wrong


@given(ANSWERS, st.sampled_from(list(VERDICTS)))
@settings(max_examples=300, deadline=None)
def test_no_answer_raises_and_only_possible_verdicts_come_out(answer, kind):
    assert parse(kind, answer) in {None, *VERDICTS[kind]}


def test_hostile_answers_end_quickly():
    for piece in ("{", "[", "\n", " ", "VERDICT: ", '{"label":', "```", "</a>", "VERDICT: A or "):
        for kind in VERDICTS:
            assert parse(kind, piece * (60_000 // len(piece))) is None
    assert parse("factuality", '{"label":' + "[" * 100_000) is None


@given(ANSWERS)
@settings(max_examples=200, deadline=None)
def test_what_stands_before_the_final_verdict_never_changes_it(quoted):
    quoted = re.sub(r"</?think(?:ing)?>", "", quoted)  # the judge does not reason in its answer
    assert parse("quality", f"B says: {quoted}\n\nVERDICT: A") == "A"
    honest = json.dumps({"reasoning": quoted, "label": "Definite Hallucination"})
    assert parse("factuality", honest) == "Definite Hallucination"


@given(st.lists(ANSWERS, min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_text_leaves_its_section(texts):
    prefix, a, b = (text.replace("\r", "") + "x" for text in texts)
    a += " {b} {mark} </a deadbeef> {prefix}"
    question = render(load_prompts()["quality"], prefix=prefix, a=a, b=b)
    sections = {name: text for name, _, text in SECTION.findall(question)}
    assert sections == {"prefix": defuse(prefix), "a": defuse(a), "b": defuse(b)}


def test_questions_about_one_prefix_share_their_head():
    template = load_prompts()["quality"]
    one, two = (render(template, prefix="p" * 50, a=a, b="z") for a in ("first", "second"))
    assert one[: one.index("first")] == two[: two.index("second")]


def test_own_prompts_are_named_by_a_path(tmp_path, monkeypatch):
    ours = load_prompts()
    mine = tmp_path / "prompts"
    mine.mkdir()
    monkeypatch.chdir(tmp_path)
    (mine / "safety.txt").write_text("Safe?\n<text {mark}>\n{text}\n</text {mark}>")
    assert load_prompts("prompts") == load_prompts("") == ours, "another project's folder"
    for path in (mine, "./prompts", str(mine)):
        assert load_prompts(path)["safety"].startswith("Safe?")
        assert load_prompts(path)["quality"] == ours["quality"]
    with pytest.raises(UserError, match="no such folder"):
        load_prompts(tmp_path / "missing")
    for wrong in ("Is {txt} safe?", "Is it safe? {mark}"):
        (mine / "safety.txt").write_text(wrong)
        with pytest.raises(UserError, match=r"safety.txt: .* some of \{text\}"):
            load_prompts(mine)
    (mine / "safety.txt").write_bytes(b"\xff{text}")
    with pytest.raises(UserError, match=r"safety.txt: .*UTF-8"):
        load_prompts(mine)


# ---- Schedules -----------------------------------------------------------------------------------


def first_round(comparisons, n, seed=0):
    return next(schedule(comparisons, n, 0, np.random.default_rng(seed)))


@pytest.mark.parametrize("n", range(2, 18))
def test_schedules_are_regular_and_balanced(n):
    for comparisons in ["all", *range(1, n)]:
        pairs = first_round(comparisons, n, seed=n)
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
        games, firsts = Counter(i for pair in pairs for i in pair), Counter(i for i, _ in pairs)
        degree = n - 1 if comparisons == "all" else comparisons
        irregular = n * degree % 2  # then one candidate meets one more
        assert sorted(games.values()) == [degree] * (n - irregular) + [degree + 1] * irregular
        assert all(abs(firsts[i] - (games[i] - firsts[i])) <= games[i] % 2 for i in range(n)), pairs
    pivot = Counter(frozenset(pair) for pair in first_round("pivot", n))
    assert pivot == {frozenset((0, i)): 1 for i in range(1, n)}


def test_random_opponents_estimate_all_pairs_without_bias():
    n, better = 8, np.random.default_rng(0).random((8, 8))
    better = np.triu(better, 1) + np.tril(1 - better.T, -1)  # [first, second], no order effect
    means = []
    for seed in range(4000):
        rounds = schedule(3, n, 0, np.random.default_rng(seed))
        pairs = next(rounds)
        with pytest.raises(StopIteration) as done:
            rounds.send([better[pair] for pair in pairs])
        means.append(done.value.value)
    assert np.allclose(np.mean(means, 0), better.sum(1) / (n - 1), atol=0.012)


@pytest.mark.parametrize("n", [2, 4, 5, 8, 9, 16, 17])
def test_race_names_both_ends_at_a_quarter_of_the_questions(n):
    right = 0
    for seed in range(20):
        worth = np.random.default_rng(seed).permutation(n)
        rounds, outcomes, asked = schedule("race", n, 0, np.random.default_rng(seed)), None, 0
        try:
            while True:
                pairs = rounds.send(outcomes)
                asked += len(pairs)
                outcomes = [float(worth[i] > worth[j]) for i, j in pairs]
        except StopIteration as done:
            scores = done.value
        right += (scores.argmax(), scores.argmin()) == (worth.argmax(), worth.argmin())
        assert asked <= max(np.ceil(n * (n - 1) / 8), np.ceil(1.5 * n)) and scores.min() >= 0
    assert right >= 20 - n % 2  # byes may cost an odd number its way


def test_expected_wins_by_hand():
    # two players, one game: the slope 1 - s(d) equals the pull of the prior, 0.5 * d / 2
    wins = expected_wins(2, [(0, 1)], [1.0])
    difference = np.log(wins[0] / wins[1])
    assert wins.sum() == pytest.approx(1) and 1 - wins[0] == pytest.approx(difference / 4, rel=1e-4)
    assert expected_wins(3, [(0, 1)], [np.nan]).tolist() == [0.5, 0.5, 0.5]


# ---- Rewards -------------------------------------------------------------------------------------


def test_rewards_by_hand():
    pools = [["aaaa", None, "a", "aa", "aa", " "], ["a", "aa", "aaa", "aaaa", "aaaaa", "aaaaaa"]]
    sources = ["suffix", "rewrite"] + ["rollout"] * 4
    scores = score(Teacher(longer), pools, sources, rewards="quality,safety:2,factuality")
    quality = [[1, np.nan, 0, 0.5, 0.5, 0], [0, 0.2, 0.4, 0.6, 0.8, 1]]
    np.testing.assert_allclose(scores.by_kind["quality"], quality)
    others = [[3, np.nan, 3, 3, 3, 0], [3] * 6]  # 2 safety, 1 facts; blank text earns nothing
    np.testing.assert_allclose(scores.reward, np.add(quality, others))
    assert (scores.calls, scores.failed, scores.absent) == (3 + 15 + 2 * 9, 0, 0)
    assert {example["kind"] for example in scores.examples} == {"quality", "safety", "factuality"}
    sources, how = ["rewrite", "rollout", "rollout", "suffix"], dict(comparisons="pivot")
    pools = [["aaa", "a", "aaaaa", "aa"]]
    scores = score(Teacher(longer), pools, sources, rewards="quality", **how)
    np.testing.assert_allclose(scores.reward, [[1, 0, 1, 1 / 3]])  # the pivot is the suffix


@pytest.mark.parametrize("n", [2, 7, 8])
def test_a_judge_that_always_says_a_is_cancelled(n):
    pools = [["x" * (i + 1) for i in range(n)]]
    always = Teacher(lambda texts, seed: "VERDICT: A")
    assert np.all(score(always, pools, rewards="quality", judge_samples=2).reward == 0.5)
    once = score(always, pools, rewards="quality").reward  # odd numbers of games cannot balance
    assert np.all(np.abs(once - 0.5) <= (0.5 / (n - 1) if n % 2 == 0 else 0) + 1e-12)


def test_absent_verdicts_are_counted_and_shift_nobody_else():
    def broken(texts, seed):
        lost = {"aaa", "xxx"} & {texts.get("a"), texts.get("b")}
        return "no idea" if lost else longer(texts, seed)

    pools = [["a", "aa", "aaa", "aaaa"]]
    refused = Answer(None, "content_filter", 0, 0, refused=True)  # no other seed would help
    refuses = Teacher(lambda t, s: refused if t.get("text") == "aa" else longer(t, s))
    scores = score(refuses, pools)
    assert np.isnan(scores.reward).tolist() == [[False, True, False, False]]
    assert (scores.calls, scores.failed, scores.absent) == (6 + 4, 1, 1)
    scores = score(Teacher(broken), pools, rewards="quality", judge_retries=2)
    np.testing.assert_allclose(scores.reward, [[0, 0.5, np.nan, 1]])
    assert (scores.calls, scores.failed, scores.absent) == (3 + 3 * 3, 9, 3)
    many = [["x" * i for i in range(1, 9)]]
    race = score(Teacher(broken), many, rewards="quality", comparisons="race")
    assert np.isnan(race.reward[0]).tolist() == [i == 3 for i in range(1, 9)]


def test_malformed_answers_are_asked_again_with_another_seed():
    def moody(texts, seed):
        return longer(texts, seed) if seed % 3 else "Well."

    teacher = Teacher(moody)
    scores = score(teacher, [["a", "aa", "aaa", "aaaa", "aaaaa"]], judge_retries=20)
    assert scores.failed > 0 and scores.absent == 0
    np.testing.assert_allclose(scores.reward, [[1, 1.25, 1.5, 1.75, 2]])
    assert max(teacher.asked.values()) == 1  # never the same question with the same seed


def test_a_pair_in_both_orders_and_a_text():
    def says_a(texts, seed):
        return "VERDICT: A" if "a" in texts else "VERDICT: " + ("SAFE" if seed % 2 else "UNSAFE")

    def worth(answer, *shown, **how):
        teacher = Teacher(answer)
        judge = Judge(teacher, Config(judge_retries=0))
        return teacher.run(judge.worth(*shown, prefix="p", **how)).result(10), teacher

    for shown in (("aa", "a"), ("a", "aa")):
        value, _ = worth(longer, "quality", *shown, both_orders=True)
        assert value == (shown[0] == "aa")
    value, teacher = worth(says_a, "quality", "aa", "a", samples=3, both_orders=True)
    assert value == 0.5 and len(teacher.asked) == 6
    assert worth(says_a, "quality", "aa", "a", samples=3)[0] == pytest.approx(2 / 3)  # in turns
    assert 0 < worth(says_a, "safety", "x", samples=40)[0] < 1
    assert np.isnan(worth(lambda t, s: "Well.", "safety", "x", samples=2)[0])


@pytest.mark.parametrize("comparisons", ["all", "3", "race"])
def test_the_order_of_arrival_and_the_batch_change_nothing(comparisons):
    def noisy(texts, seed):
        return "VERDICT: " + "AB"[seed % 2] if "a" in texts else longer(texts, seed)

    pools = [["x" * (i + 1) + str(b) for i in range(8)] for b in range(4)]
    options = dict(comparisons=comparisons, judge_samples=2)
    one, two = (score(Teacher(noisy), pools, **options).reward for _ in range(2))
    assert np.array_equal(one, two) and len(set(one.ravel())) > 2
    assert np.array_equal(score(Teacher(noisy), pools[:1], **options).reward, one[:1])


def test_the_race_is_about_the_sum_of_the_rewards():
    def answer(texts, seed):  # the longer half is unsafe
        unsafe = "a" not in texts and len(texts["text"]) > 8
        return "VERDICT: UNSAFE" if unsafe else longer(texts, seed)

    pools = [["x" * (i + 1) for i in range(16)]]
    reward = score(Teacher(answer), pools, comparisons="race").reward[0]
    assert reward.argmax() == 7 and reward.argmin() == 8


def test_a_lost_teacher_is_an_error_and_leaves_nothing_running():
    def gone(texts, seed):
        raise ConnectionError("gone")

    teacher = Teacher(gone)
    with pytest.raises(ConnectionError):
        score(teacher, [["a", "aa", "aaa"]] * 3)

    async def running():
        await asyncio.sleep(0.05)
        return len(asyncio.all_tasks())

    assert teacher.run(running()).result() == 1


def test_a_pool_that_is_scored_again_replaces_itself(tmp_path):
    with closing(Store(tmp_path / "judgments.sqlite")) as store:
        for _ in range(2):  # as after a resume
            score(Teacher(longer), [["a", None, "aa"]], step=5, store=store)
        assert store.find("SELECT step, key, count(*) FROM pools") == (5, 0, 1)


# ---- Tools ---------------------------------------------------------------------------------------


def test_replay_needs_no_judge(tmp_path):
    words = [document(0, i).split() for i in range(9)]
    config = Config(rewards="quality,safety", judge_model="world", seed=3)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config) | {"an_old_key": 1}))
    cache = tmp_path / "judgments.sqlite"
    with Chat(teacher_at("world", {"noise": 0.1}), "world", cache=cache) as chat:
        pool = [" ".join(w[56:88]) for w in words[:8]]
        judge, prefix = Judge(chat, config, chat.store), " ".join(words[8][:56])
        scores = judge.score(0, [prefix], [""], [pool], ["rollout"] * 8, [17]).result(30)
        reward = scores.reward[0]
    for comparisons, questions in (("all", 28 + 8), ("pivot", 7 + 8), ("3", 12 + 8)):
        asked, answered, same, chosen = replay(tmp_path, None, comparisons)
        assert (asked, answered, len(same), dict(chosen)) == (questions, 1, 1, {"rollout": 1})
        if comparisons == "all":
            ties = [(reward == end).sum() for end in (reward.max(), reward.min())]
            assert same == [[1 / n for n in ties]]
    assert 0 < replay(tmp_path, None, "race:1")[1] < 1  # repeats were not asked
    assert replay(tmp_path, "safety", "all")[0] == 8
    assert best(np.array([1.0, 1.0, np.nan, 0.0])).tolist() == [0.5, 0.5, 0, 0]


def test_bench_asks_the_papers_judges_as_their_rows_say(tmp_path, capsys):
    """What one run has recorded the next does not ask; a line that is no sample is named."""
    file = tmp_path / "x.jsonl"
    sample = '{"text": "x", "safe": true, "prefix": "p", "reference": "r"}\n'
    for line, told in (("[1]", "is not a JSON object"), ('{"better": "x"}', "lacks prefix, worse")):
        file.write_text(f"{sample}\n{line}")
        with pytest.raises(UserError, match=f"x.jsonl:3.*{told}"):
            bench_judge.read_samples(str(file))
    file.write_text(sample)
    answer = '{"reasoning": "", "label": "No Hallucination"}'
    judges, own = f"{ROOT}/configs/judges.py", tmp_path / "gpt.py"
    names = [f"{judges}:{name}" for name in execute(judges)[1] if name != "gpt_4o"]
    with faulty_server(answer=lambda request: answer) as server:
        own.write_text(f"judge_url, judge_model, price_in = '{server.url}', 'gpt-4o', 1e6")
        flags = [f"--judge_url={server.url}", f"--data={file}", f"--record={tmp_path}/x.sqlite"]
        for _ in range(2):
            bench_judge.main([str(own), *names, *flags])
    rows = execute(judges)[1].values()  # 9 questions, and that about safety four times
    asked = server.requests
    assert Counter(x["model"] for x in asked) == {row["judge_model"]: 13 for row in rows}
    assert {x["top_p"] for x in asked if x["model"] == "judge"} == {0.6}
    assert {x["max_tokens"] for x in asked if "oss" in x["model"]} == {4096}
    out = capsys.readouterr().out
    assert out.startswith("10 questions to each of 4 judges: ") and "GPT-4o (paper)" in out
    assert "to pay in all" in out and "| gpt_oss_120b | 0.0/0.0/100.0 |" in out
    told = "gpt_oss_120b: 4 of 13 answers malformed (at most 4096 tokens), 1 of 10 questions left"
    assert told in out


@pytest.mark.parametrize("label", ["No Hallucination", "what?"])
def test_check_says_in_seconds_what_is_wrong(tmp_path, capsys, label):
    def answer(request):
        told = f'{{"reasoning": "", "label": "{label}"}}'
        return told if "label" in prompt_of(request) else "I continue this way."

    out = tmp_path / "run"
    with faulty_server(answer=answer, owner="library") as server:
        flags = [f"--judge_url={server.url}", f"--rewrite_url={server.url}", f"--out_dir={out}"]
        code = train.main([*flags, "--rewards=factuality", "--check"])
    *_, last = capsys.readouterr().out.splitlines()
    wrong = "wrong: teachers: the judge's answers hold no verdict"
    assert (code, last[:52]) == ((0, "all is well") if label[0] == "N" else (1, wrong))
    assert server.counts["answer"] == (2 + 3 + 3 if code == 0 else 2 + 3) and not out.exists()
    code = train.main(["--check", "--data=/nowhere", f"--out_dir={out}", "--rewards="])
    told = capsys.readouterr().out.splitlines()[-1]
    assert code == 1 and told.startswith("wrong: inputs: ") and "/nowhere" in told


def test_bench_tables_hold_the_labels():
    assert set(bench_judge.FACTUALITY.values()) <= set(load_prompts())
    pair, text = dict(source="wiki"), dict(safe=True)
    given = [(pair, "better first", "A"), (pair, "worse first", "A"), (pair, "worse first", None)]
    given += [(text, "safety", "SAFE"), (text, "safety", "UNSAFE"), (text, "safety", None)]
    given += [({}, "ref v4", "No Hallucination"), ({}, "ref v4", "Definite Hallucination")]
    table = bench_judge.accuracy_table({"x": given})
    assert ["x", "wiki", 1, "100.0", "0.0", "50.0", "100.0"] in table
    assert ["x", "safety", 2, "", "", "50.0", ""] in table
    without = ({}, "no-ref v1", "No Hallucination"), ({}, "no-ref v1", "Definite Hallucination")
    both = {"x": [*given, without[0]], "y": [*given, without[1]]}
    shares = bench_judge.factuality_table(both)  # agreement is about the prompts with reference
    assert "50.0/0.0/50.0" in shares[1]
    assert [row[-1] for row in shares[1:3]] == ["reference", "100.0"]
    assert len({sample["source"] for sample in bench_judge.world_samples(30)}) > 2
