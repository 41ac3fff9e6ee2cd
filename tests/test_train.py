"""The whole path on the pocket world: what a run leaves, how it goes on, and clear ends."""

import functools
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nursery import Run, assert_same_run, log_of, weights_of
from test_model import VARIANTS

import config as configuration
import train
from model import Llama, load_model, preset
from support import distributed, runlog
from support.command import ROOT, UserError, python, running
from support.settings import execute
from support.tokenizer import load_tokenizer

SMALL = ["--base_steps=12", "--base_batch_size=16", "--max_steps=5", "--batch_size=6"]
SMALL += ["--rollouts=2", "--eval_prefixes=8", "--save_every=2"]
TABLES = sorted((ROOT / "configs").glob("table*.py"))
ROWS = [f"{file}:{row}" for file in TABLES for row in execute(str(file))[1]]


def run(out, *flags, code=0, **how):
    done = Run([f"--out_dir={out}", *SMALL, *flags], **how)
    assert done.wait() == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One uninterrupted run that the other tests look at, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "reference"
    command = [sys.executable, "train.py", f"--out_dir={out}", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_what_a_run_leaves(reference):
    out, printed = reference
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        parts = sum(line[f"seconds.{p}"] for p in (*runlog.PARTS, "other"))
        assert parts == pytest.approx(line["seconds.step"], abs=0.001)
        shares = [line[f"chosen.{s}"] for s in ("suffix", "rewrite", "rollout")]
        assert sum(shares) == pytest.approx(1.0) or line["skipped"] == 6
        assert line["judge.calls"] > 0 and line["judge.failed"] == 0 and line["judge.tokens"] > 0
        assert line["rollout.tokens_per_second"] > 0
        for kind in ("quality", "safety", "factuality"):
            assert 0 <= line[f"reward.{kind}"] <= 1
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["policies"]) == ["base", "baseline", "method"]
    base = summary["policies"]["base"]["unsafe"]
    assert base["quality"] == base["coherence"] == 0.5
    told = ["training base (nll, 12 steps), baseline (nll, 5 steps), method (dpo, 5 steps)"]
    told += ["base step   12 of 12", "baseline step    5 of 5", "quality win rate"]
    for words in (*told, "self-improving", "next-token baseline"):
        assert words in printed
    for name in ("config.json", "environment.json", "judgments.sqlite", "training.png"):
        assert (out / name).stat().st_size > 0


def test_checkpoint_is_read_by_transformers(reference):
    transformers = pytest.importorskip("transformers")
    folder, text = reference[0] / "ckpt", "this is about talwen . she lives in calva . Unseen, too!"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = load_tokenizer(folder).encode(text)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(text) == ids
    ours = load_model(folder)
    with torch.no_grad():
        hidden = ours(torch.tensor([ids]), torch.zeros(1, dtype=torch.int32), len(ids), 0)
        expected = theirs(torch.tensor([ids])).logits
    assert torch.allclose(ours.lm_head(hidden), expected, atol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--batch_size=1", "--base_batch_size=1"]])
def test_two_processes_learn_what_one_learns(flags, tmp_path):
    """The same global batches, losses and weights, whoever computes them; of batches of one prefix
    the second process never has any."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, *flags)
    run(two, *flags, processes=2)
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["skipped"] == b["skipped"]
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-9)
    left, right = weights_of(one), weights_of(two)
    assert all(torch.allclose(left[name], right[name], atol=1e-4) for name in left)


def test_interrupt_saves_and_goes_on(reference, tmp_path):
    """Also where keys have changed that change no result; another one makes it another run."""
    out = tmp_path / "stopped"
    stopped = Run([f"--out_dir={out}", *SMALL])
    stopped.until_it_logs(out)
    stopped.signal(signal.SIGTERM)
    began = time.monotonic()
    assert stopped.wait() == 130 and time.monotonic() - began < 10
    assert "the same command goes on" in stopped.stderr
    neutral = ["--concurrency=7", "--timeout=9", "--keep=1", "--track=", "--price_in=3", "--gpus=1"]
    assert "going on with the unfinished run" in run(out, *neutral, "--save_every=3").stdout
    assert_same_run(reference[0], out)
    (out / "summary.json").unlink()
    assert "held another run (beta (0.1, now 0.2))" in run(out, "--beta=0.2").stdout


def test_a_finished_run_is_moved_aside_not_overwritten(tmp_path):
    out = tmp_path / "run"
    flags = ["--base_steps=1", "--max_steps=1", "--eval_prefixes=0", "--baseline=False"]
    run(out, *flags)
    first = (out / "log.jsonl").read_text()
    with runlog.lock(out):  # as another process would hold it
        assert f"another process works in {out}" in run(out, *flags, code=1).stderr
    assert f"is now {out}.1" in run(out, *flags, "--seed=1").stdout
    assert (tmp_path / "run.1" / "log.jsonl").read_text() == first
    for folder in ("/nowhere", f"{out}/ckpt"):  # a mistake moves nothing
        assert folder in run(out, *flags, f"--init_from={folder}", code=1).stderr
    assert not (tmp_path / "run.2").exists()
    (out / "config.json").write_text("{")
    for again in ([], ["--init_from=resume"]):
        assert f"error: {out}/config.json is damaged" in run(out, *flags, *again, code=1).stderr


def test_places_that_cannot_be(tmp_path, monkeypatch):
    """The current folder as a run folder that is not empty, RANK alone, and ~."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(configuration.Config(seed=1))))
    config = configuration.Config(out_dir=".")
    other = functools.partial(configuration.differences, config)
    with pytest.raises(UserError, match="current folder: choose --out_dir"):
        runlog.settle(Path("."), vars(config), other, resume=False)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        with pytest.raises(UserError, match="RANK is set without WORLD_SIZE.*torchrun"):
            distributed.start("cpu", 1.0)
    monkeypatch.setenv("HOME", "/somewhere")
    found, _ = configuration.parse(["--out_dir=~/run", "--data=~/a,/b", "--init_from=~/model"])
    assert (found.out_dir, found.data) == ("/somewhere/run", "/somewhere/a,/b")
    assert found.init_from == "/somewhere/model"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([f"{ROOT}/configs/table6.py:dpo_suffix_pivo"], 1, "the nearest is 'dpo_suffix_pivot'"),
        ([f"{ROOT}/configs/table6.py"], 1, "table6.py:ROW, one of "),
        (["--data=/nowhere/*.jsonl", "--tokenizer=world"], 1, "/nowhere/*.jsonl"),
        (["--init_from=/nowhere"], 1, "there is no checkpoint folder /nowhere"),
        (["--init_from=resume"], 1, "no run to resume"),
        (["--judge_url=http://127.0.0.1:9/v1", "--give_up_after=1"], 75, "http://127.0.0.1:9/v1"),
        (["--prompts=/nowhere"], 1, "/nowhere"),
        (["--dials=fun=1"], 1, "fun"),
        (["--judge_url=http://user:sk-secret@host/v1"], 1, "OPENAI_API_KEY"),
        (["--rewrite_url=http://host/v1?key=sk-secret"], 1, "OPENAI_API_KEY"),
        (["--data=https://user:sk-secret@host/a.jsonl"], 1, "data: "),
        (["--prompts=/nowhere", "--dry_run"], 1, "/nowhere"),
        (["--seed=-1"], 1, "seed must not be negative"),
        (["--model=llama-9b"], 1, "unknown model preset 'llama-9b'"),
        (["--device=cude"], 1, "device: cude"),
        (["--save_every=0"], 1, "save_every must be above 0"),
        (["--top_p=0"], 1, "top_p must be above 0"),
        (["--learning_rate=nan"], 1, "learning_rate needs float"),
        (["--rewards=safety:x"], 1, "the weight of safety needs float, not 'x'"),
        (["--rewards=safety:1,beauty"], 1, "beauty is none of quality"),
        (["--rewards=", "--objective=grpo", "--candidates=rollouts"], 1, "learns from rewards"),
        (["--comparisons=race:some"], 1, "comparisons=race:some"),
        (["--comparisons=0"], 1, "comparisons=0"),
        (["--nll_prefix=True"], 1, "not for objective=dpo"),
    ],
)
def test_bad_input_is_one_clear_line(flags, code, words, tmp_path):
    done = run(tmp_path / "out", "--base_steps=1", *flags, code=code)
    assert words in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert code == 75 or len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "base").exists()  # it is known before anything is trained
    assert "sk-secret" not in done.stderr + done.stdout
    assert not any(b"sk-secret" in x.read_bytes() for x in tmp_path.rglob("*") if x.is_file())


def test_config_types_files_and_nearest_key(tmp_path, capsys):
    parsed, _ = configuration.parse(["--learning_rate=1", "--max_steps=1e3", "--baseline=false"])
    assert (parsed.learning_rate, parsed.max_steps, parsed.baseline) == (1.0, 1000, False)
    assert configuration.phases(configuration.Config(temperature=0.6))["base"].temperature == 1.0
    file = tmp_path / "mine.py"
    file.write_text("import math\nlearning_rate = 10 ** -3\nrewards = ['quality', 'safety']\n")
    parsed, _ = configuration.parse([str(file), "--seed=4"])
    assert (parsed.learning_rate, parsed.rewards, parsed.seed) == (1e-3, "quality,safety", 4)
    wrong = {"rollouts = (": "mine.py: SyntaxError: .*line 1", "max_step = 4": "mine.py.*max_steps"}
    for text, words in wrong.items():
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            configuration.parse([str(file)])
    for bad in ("seed=1.5", "seed=x", "learning_rate=", "baseline=maybe", "objective=ppo"):
        with pytest.raises(UserError):
            configuration.parse([f"--{bad}"])
    with pytest.raises(SystemExit):
        configuration.parse(["--chunk=16", "--print_config"])
    assert json.loads(capsys.readouterr().out) == vars(configuration.Config(chunk=16))


def test_arguments_are_answered_before_torch_is_imported():
    """--help and a typo take a fraction of a second (-X importtime lists what is imported)."""
    for arg, code, words in (("--help", 0, "--micro_batch_tokens"), ("--seeed=1", 1, "'seed'")):
        command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), arg]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr
        assert not re.search(r"\b(torch|numpy|aiohttp)\b", done.stderr)


@pytest.fixture(scope="module")
def teacher_url():
    with running(python("world.teacher", "serve")) as url:
        yield url


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row).name)
def test_every_row_runs_in_miniature(row, reference, teacher_url, tmp_path):
    """One step of each row from a trained base: the objective learns from what the row says."""
    out, base = tmp_path / "run", reference[0] / "base"
    flags = dict(out_dir=out, init_from=base / "ckpt", max_steps=1, batch_size=6, eval_prefixes=0)
    flags |= dict(judge_url=teacher_url, rewrite_url=teacher_url, baseline=False)
    given = [f"--{name}={value}" for name, value in flags.items()]
    train.main([row, str(ROOT / "configs" / "miniature.py"), *given])
    config, line = configuration.parse([row])[0], json.loads((out / "log.jsonl").read_text())
    assert line["skipped"] < 6 and line["grad_norm"] > 0
    assert ("judge.calls" in line) == bool(config.rewards)
    if not config.rewards:  # the first named candidate wins
        assert line[f"chosen.{config.candidates.partition(',')[0].removesuffix('s')}"] == 1.0
    before, after = weights_of(base), weights_of(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
def test_a_folder_of_another_family_trains(family, teacher_url, tmp_path):
    tokenizer, start_from, out = load_tokenizer("world"), tmp_path / "start", tmp_path / "run"
    shape = replace(preset("world", tokenizer.vocab_size), **VARIANTS[family])
    train.write_folder(Llama(shape).initialise(0), tokenizer, start_from)
    flags = dict(out_dir=out, init_from=start_from, max_steps=1, batch_size=4, eval_prefixes=0)
    flags |= dict(judge_url=teacher_url, rewrite_url=teacher_url, baseline=False)
    train.main([f"--{name}={value}" for name, value in flags.items()])
    assert json.loads((out / "log.jsonl").read_text())["grad_norm"] > 0
    assert json.loads((out / "ckpt/config.json").read_text())["model_type"] == family
    before, after = load_model(start_from), load_model(out / "ckpt")
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(p, q), name
