"""The lm-evaluation-harness adapter: what HFLM says of the same weights, at fewer positions."""

import json
import random

import pytest

from model import Llama, preset, save_model
from support.command import UserError
from support.tokenizer import load_tokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # its HFLM needs it

import harness  # noqa: E402

from world.corpus import NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy of the pocket world that can read 96 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("ckpt"), load_tokenizer("world")
    shape = preset("world", tokenizer.vocab_size)
    shape.max_seq = 96
    save_model(Llama(shape).initialise(0), folder, None, tokenizer.eos)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    return harness.NanoSIP(folder, positions=512), theirs


def texts(rng, n):
    words = ["the", "home", "of", "meal", "pet", "is", "a", "lives", "in", "bread", ".", "red"]
    return " ".join(rng.choice(words + NAMES) for _ in range(n))


def both(pair, kind, requests):
    from lm_eval.api.instance import Instance

    instances = [Instance(kind, {}, request, i) for i, request in enumerate(requests)]
    return [getattr(model, kind)(instances, disable_tqdm=True) for model in pair]


def test_log_likelihoods_are_those_of_hflm(pair):
    """Choices, letters behind examples, no context, trailing spaces, contexts that are too long,
    one choice that begins another, repeated requests."""
    rng = random.Random(0)
    head = texts(rng, 40)
    contexts = [texts(rng, rng.randint(1, 30)) for _ in range(8)]
    requests = [(c, " " + texts(rng, rng.randint(1, 9))) for c in contexts for _ in range(4)]
    requests += [(f"{head} . {texts(rng, 8)} :", f" {a}") for _ in range(6) for a in "abcd"]
    requests += [(contexts[0], " the home"), (contexts[0], " the home of red"), requests[0]]
    requests += [("", "the home"), ("the ", "pet"), (texts(rng, 120), " red"), ("a", " a")]
    rng.shuffle(requests)
    ours, theirs = both(pair, "loglikelihood", requests)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]


def test_rolling_log_likelihoods_of_texts_longer_than_the_model_reads(pair):
    rng = random.Random(1)
    ours, theirs = both(pair, "loglikelihood_rolling", [(texts(rng, n),) for n in (5, 96, 250)])
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generation_stops_where_hflm_stops(pair):
    rng = random.Random(2)
    how = [{"until": [" ."], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 40}]
    requests = [(texts(rng, rng.randint(1, 70)), how[i % 2]) for i in range(8)]
    ours, theirs = both(pair, "generate_until", requests)
    assert ours == theirs and any(ours)


def test_samples_of_one_context_differ_whatever_the_batch(folder):
    from lm_eval.api.instance import Instance

    model = harness.NanoSIP(folder, positions=40)  # three at a time
    how = {"until": [], "max_gen_toks": 8, "do_sample": True}
    requests = [Instance("generate_until", {}, ("the home of mirela", how), i) for i in range(6)]
    assert len(set(model.generate_until(requests))) == 6
    nothing = Instance("generate_until", {}, ("", {"until": [], "max_gen_toks": 8}), 0)
    assert len(model.generate_until([nothing])) == 1
    long = Instance("generate_until", {}, ("the home", {"until": [], "max_gen_toks": 96}), 0)
    with pytest.raises(UserError, match="reads 96 tokens, 96 are asked for"):
        model.generate_until([long])


def test_greedy_is_said_of_greedy_continuations(pair):
    model = pair[0]
    context = model.tok_encode("the home of mirela")
    text = model.generate([context], [], 6, {}, [0])[0]
    asked = [(None, context, model.tok_encode(text)), (None, context, context)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(asked)] == [True, False]
    assert model._loglikelihood_tokens([(None, context, [])]) == [(0.0, True)]


def test_rows_share_what_sequences_begin_with():
    """Every sequence is in one row, no row is too long, and the work is that of the tree."""
    rng = random.Random(3)
    heads = [tuple(rng.choices(range(9), k=30)) for _ in range(3)]
    feeds = [h + tuple(rng.choices(range(9), k=rng.randint(0, 6))) for h in heads for _ in range(8)]
    rows = harness.rows_of(feeds + feeds, 70)
    assert sorted(f for row in rows for f in row.feeds) == sorted(set(feeds))
    for row in rows:
        assert len({feed[: row.prefix] for feed in row.feeds}) == 1 and row.prefix > 0
        assert row.cost <= 70 or len(row.feeds) == 1
    assert sum(row.cost for row in rows) < 0.45 * sum(map(len, set(feeds)))
    assert sum(len(batch) for batch in harness.batches_of(rows, 200)) == len(rows)


def test_own_task_files_run_as_in_the_harness(folder, pair, tmp_path, capsys):
    """A multiple-choice and a generation task on local files, by the command and by HFLM."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rng = random.Random(4)
    data = tmp_path / "data.jsonl"
    rows = [
        {"q": texts(rng, 12), "choices": [texts(rng, 3) for _ in range(4)], "gold": i % 4}
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (tmp_path / "pick.yaml").write_text(f"""task: pick
{common}output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (tmp_path / "say.yaml").write_text(f"""task: say
{common}output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: [" ."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
""")
    out = tmp_path / "result.json"
    harness.main([str(folder), "--tasks=pick,say", f"--include_path={tmp_path}", f"--out={out}"])
    found = json.loads(out.read_text())["checkpoint"]
    expected = simple_evaluate(
        model=pair[1],
        tasks=["pick"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["pick"]
    assert found["pick"]["mean"] == expected["acc_norm,none"] and found["pick"]["n"] == 12
    assert found["pick"]["all"]["pick"]["acc,none"] == expected["acc,none"]
    assert sum(found["pick"]["values"]) / 12 == pytest.approx(found["pick"]["mean"])
    assert found["say"]["metric"] == "exact_match" and "pick" in capsys.readouterr().out


def test_declared_start_token_stands_before_texts_without_context(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    assert harness.declared_start(tmp_path, load_tokenizer(tmp_path)) is None
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"bos_token": {"content": "<|endoftext|>"}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert harness.declared_start(tmp_path, tokenizer) == tokenizer.eos
