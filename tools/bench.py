"""Ours beside what one would use instead: same weights, same tokens, one machine, one run.

    python -m tools.bench [sampler update step scaling kernels]      all, or the named sections

Out: a line a measurement, and bench.json. Ratios are of medians over rounds in which the sides take
turns, since machines are noisy. Peers (transformers, openai, datasets, flash-attn, Liger)
are needed here only; a section whose peer is not installed says so. On a GPU `kernels` measures the
Triton kernels, on a CPU the PyTorch definitions.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from functools import partial
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from candidates import make_pool
from config import Config
from data import Batch
from model import Llama, ModelConfig, preset, save_model
from objectives import dpo_loss
from rollout import sample_rollouts
from update import make_optimizer
from update import update as update_policy


def llama_30m() -> Llama:
    """Small enough for a CPU, shaped like a Llama: 8 layers of width 512, GQA, 8,192 tokens."""
    shape = ModelConfig(8192, n_layer=8, n_head=8, n_kv_head=4, d_model=512, d_ff=1408, head_dim=64)
    return Llama(shape).initialise(0)


def clock() -> float:
    """Seconds; with a single thread those of CPU, which other programs disturb less."""
    cpu = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if cpu else time.perf_counter()


def in_turns(sides: dict, rounds: int = 3) -> dict[str, float]:
    """Median seconds of each callable; the sides take turns, the first round only warms up."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peer_of(ours: Llama):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def roofline(
    config: ModelConfig, B: int, P: int, K: int, N: int, rate: float, bandwidth: float
) -> float:
    """Least seconds for K rollouts of B prefixes in float32: every stage at the machine's matrix
    product rate (FLOP/s), or at its bandwidth (bytes/s) where that takes longer."""
    c = config
    layers = c.n_layer * (
        2 * c.d_model * c.head_dim * (c.n_head + c.n_kv_head) + 3 * c.d_model * c.d_ff
    )
    per_key, head = 4 * c.n_layer * c.n_head * c.head_dim, c.vocab_size * c.d_model
    kv = 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim  # bytes a token
    seconds = B * (2 * layers * P + per_key * P * P / 2 + 2 * head) / rate
    for t in range(1, N):
        work = B * K * (2 * (layers + head) + per_key * (P + t))
        read = 4 * (layers + head) + B * kv * (P + K * t)
        seconds += max(work / rate, read / bandwidth)
    return seconds


@torch.no_grad()
def sampler():
    """16 rollouts of 64 tokens of 1 and of 4 prefixes: ours, transformers' generate, and the
    roofline."""
    ours, K, N = llama_30m(), 16, 64
    theirs, square, stream = peer_of(ours), torch.randn(1024, 1024), torch.randn(64, 2**20)

    def generate(prefix, cache, length=N):
        how = dict(do_sample=True, top_k=0, max_new_tokens=length, num_return_sequences=K)
        how |= dict(pad_token_id=0, eos_token_id=None, cache_implementation=cache)
        theirs.generate(prefix, attention_mask=torch.ones_like(prefix), **how)

    for P in (256, 1024):
        caches = {"default": None, "static": "static"}
        for B in (1, 4):
            prefix = torch.randint(8000, (B, P), generator=torch.Generator().manual_seed(P))
            how = dict(eos=-1, seed=0, index=torch.arange(B))
            if P > 256 and B == 1:  # the slower of its two caches would take minutes
                few = {name: partial(generate, prefix, cache, 3) for name, cache in caches.items()}
                quick = in_turns(few, rounds=1)
                caches = {name: caches[name] for name in (min(quick, key=quick.get),)}
            pad = torch.zeros(B, dtype=torch.int32)
            sides = {
                "ours": partial(sample_rollouts, ours, prefix, pad, K, N, **how),
                "product": lambda: [torch.mm(square, square) for _ in range(10)],
                "stream": stream.sum,
            }
            sides |= {name: partial(generate, prefix, cache) for name, cache in caches.items()}
            seconds = in_turns(sides, rounds=3 if B * P == 256 else 2)
            rate = 20 * 1024**3 / seconds.pop("product")
            bandwidth = stream.nbytes / seconds.pop("stream")
            least = roofline(ours.config, B, P, K, N, rate, bandwidth)
            for side, value in seconds.items():
                yield {
                    "what": f"sampler B={B} P={P} K={K} N={N}",
                    "side": side if side == "ours" else f"transformers, {side} cache",
                    "tokens_per_second": B * K * N / value,
                    "ours_is_faster_by": value / seconds["ours"],
                    "share_of_roofline": least / value,
                }
            yield {
                "what": f"roofline B={B} P={P}",
                "gflops": rate / 1e9,
                "gb_per_second": bandwidth / 1e9,
                "seconds": least,
            }
            best = min(caches, key=seconds.get)
            caches = {best: caches[best]}  # more prefixes: the faster one only


def peak_bytes(run) -> int:
    """Most memory that tensors made by run() hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def trl_dpo(policy: Llama, reference: Llama, pair: torch.Tensor, P: int):
    """TRL's DPOTrainer on the same weights: its loss on its padded pairs, and the gradients."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"x": 0, "<e>": 1}, unk_token="x"))
    text = dict(prompt=["x"], chosen=["x"], rejected=["x"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            peer_of(policy),
            ref_model=peer_of(reference),
            args=DPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(text),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, eos_token="<e>", pad_token="<e>"
            ),
        )
    model = trainer.model.train()
    inputs = {
        "input_ids": pair,
        "attention_mask": torch.ones_like(pair),
        "completion_mask": (torch.arange(pair.shape[1]) >= P).long().expand_as(pair),
    }

    def run() -> float:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


def update():
    """A DPO pair (policy and reference) and a GRPO group of 16: forward and backward."""
    shape = ModelConfig(8192, n_layer=4, n_head=8, n_kv_head=4, d_model=512, d_ff=1408, head_dim=64)
    policy, reference = Llama(shape).initialise(0), Llama(shape).initialise(1)
    pad, rng = torch.zeros(1, dtype=torch.int32), torch.Generator().manual_seed(0)

    def tokens(*shape):
        return torch.randint(8000, shape, generator=rng)

    def dpo(prefix, continuations, compiled: bool = False) -> float:
        B, policy.compiled = len(prefix), compiled
        layout = prefix, pad.expand(B), continuations
        with torch.no_grad():
            anchor = reference.logprobs(*layout).sum(dim=2)
        scores = policy.logprobs(*layout).sum(dim=2)
        loss = dpo_loss(scores.view(-1, 2), anchor.view(-1, 2), 0.1).sum()
        loss.backward()
        policy.zero_grad()
        return loss.item()

    def grpo(prefix, continuations, rows: int):
        for i in range(0, len(prefix), rows):
            part = continuations[i : i + rows]
            policy.logprobs(prefix[i : i + rows], pad.expand(len(part)), part).sum().backward()
        policy.zero_grad()

    prefix, pair = tokens(1, 1920), tokens(1, 2, 128)
    separate = prefix.expand(2, -1), pair.transpose(0, 1)
    pairs = {
        "ours": partial(dpo, prefix, pair),
        "ours, compiled": partial(dpo, prefix, pair, True),
        "TRL": trl_dpo(policy, reference, torch.cat((separate[0], separate[1][:, 0]), 1), 1920),
        "ours, a row each": partial(dpo, *separate),
    }
    values = [run() for run in pairs.values()]
    assert max(values) - min(values) < 1e-3, values  # the same loss
    prefix, group = tokens(1, 480), tokens(1, 16, 32)
    separate = prefix.expand(16, -1), group.transpose(0, 1)
    groups = {
        "ours": partial(grpo, prefix, group, 1),
        "ours, a row each": partial(grpo, *separate, 4),
    }
    for what, sides in {"DPO P=1920 N=128": pairs, "GRPO of 16 P=480 N=32": groups}.items():
        seconds = in_turns(sides, rounds=2)
        peaks = {side: peak_bytes(run) for side, run in sides.items()}
        for side, value in seconds.items():
            yield {
                "what": what,
                "side": side,
                "seconds": value,
                "ours_is_faster_by": value / seconds["ours"],
                "peak_mb": peaks[side] / 1e6,
                "ours_needs_less_by": peaks[side] / peaks["ours"],
            }


def crc(text: str) -> float:
    """A reward that costs nothing and never ties."""
    return zlib.crc32(text.encode()) / 2**32


def timed(spent: Counter, phase: str, run):
    """run, with its seconds added to spent[phase]."""

    def call(*args, **kwargs):
        began = clock()
        result = run(*args, **kwargs)
        spent[phase] += clock() - began
        return result

    return call


def our_step(policy: Llama, words, prompts: list, N: int, K: int, spent: Counter):
    """train.py's step with `crc` for a judge."""
    B, P = len(prompts), len(prompts[0].split())
    config = Config(
        candidates="rollouts", rollouts=K, chunk=N, max_seq=P + N, batch_size=B, learning_rate=1e-5
    )
    policy, reference = copy.deepcopy(policy), policy
    optimizer, tokenizer = (
        make_optimizer(policy, config),
        SimpleNamespace(eos=1, decode=words.decode),
    )

    def rollouts():
        prefix = torch.tensor([words.encode(prompt).ids for prompt in prompts])
        pad, suffix = torch.zeros(B, dtype=torch.int32), torch.zeros(B, N, dtype=torch.int64)
        batch = Batch(prefix, pad, suffix, torch.arange(B), prompts, [], {})
        return make_pool(policy, batch, None, config, tokenizer)

    def rewards(pool):
        return torch.tensor([[crc(text) for text in row] for row in pool.texts])

    rollouts, rewards = timed(spent, "rollouts", rollouts), timed(spent, "rewards", rewards)

    def run():
        pool = rollouts()
        update_policy(policy, reference, optimizer, pool, rewards(pool), 5, config)

    return timed(spent, "step", run)


def trl_step(policy: Llama, words, prompts: list, N: int, spent: Counter):
    """TRL's OnlineDPOTrainer on the same weights: sampling, reward function, loss, optimiser."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def reward(completions, **_):
        return [crc(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        trainer = OnlineDPOTrainer(
            peer_of(policy),
            ref_model=peer_of(policy),
            reward_funcs=timed(spent, "rewards", reward),
            args=OnlineDPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,  # it would sample without a cache
                max_new_tokens=N,
                max_length=len(prompts[0].split()) + N,
                temperature=1.0,
                learning_rate=1e-5,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, eos_token="w1", pad_token="w1"
            ),
        )
    trainer._generate = timed(spent, "rollouts", trainer._generate)
    optimizer = trainer.create_optimizer()

    def run():
        trainer.training_step(trainer.model, {"prompt": prompts})
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return timed(spent, "step", run)


def step():
    """A whole step of DPO on two rollouts a prefix, and the share of its phases; ours with 16, too.

    The reward is a Python function in both, so that a judge's speed plays no part.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    for name, V, B, P, N, rounds in (
        ("world", 846, 32, 64, 32, 5),
        ("smollm2-135m", 49152, 2, 128, 32, 2),
    ):
        policy = Llama(preset(name, V)).initialise(0)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ids = torch.randint(2, V, (B, P), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [" ".join(f"w{i}" for i in row) for row in ids]
        spent = {side: Counter() for side in ("ours", "TRL", "ours, 16 rollouts")}
        given = policy, words, prompts, N
        seconds = in_turns(
            {
                "ours": our_step(*given, 2, spent["ours"]),
                "TRL": trl_step(*given, spent["TRL"]),
                "ours, 16 rollouts": our_step(*given, 16, spent["ours, 16 rollouts"]),
            },
            rounds,
        )
        for side, value in seconds.items():
            whole, shares = spent[side]["step"], spent[side]
            yield {
                "what": f"step of {name} B={B} P={P} N={N} K=2",
                "side": side,
                "seconds": value,
                "ours_is_faster_by": value / seconds["ours"],
                "rollouts": shares["rollouts"] / whole,
                "rewards": shares["rewards"] / whole,
                "update": 1 - (shares["rollouts"] + shares["rewards"]) / whole,
            }


def kernels():
    from tools.bench_kernels import rows

    yield from rows()


SECTIONS = {f.__name__: f for f in (sampler, update, step, kernels)}


def main(argv: list[str]):
    if wrong := [name for name in argv if name not in SECTIONS]:
        sys.exit(f"no section {wrong[0]!r}; there are {', '.join(SECTIONS)}")
    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in argv or SECTIONS:
        try:
            for row in SECTIONS[name]():
                rows.append({"section": name} | row)
                cells = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
                print("  ".join(f"{k} {v}" for k, v in zip(row, cells, strict=True)), flush=True)
        except ImportError as e:
            print(f"{name}: left out, {e}")
    with open("bench.json", "w", encoding="utf-8") as f:
        json.dump(rows, f, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
