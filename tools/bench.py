"""Ours beside what one would use instead: same weights, same tokens, one machine, one run.

    python -m tools.bench                             all sections
    python -m tools.bench sampler update              against transformers, llama.cpp, TRL; a CPU
    python -m tools.bench growth                      what costs how much, and --dry_run's forecast
    python -m tools.bench kernels step --minutes 8    the first thing to run on a GPU (docs/gpu.md)

Out: a line a measurement, each written to bench.jsonl as well when it is made, until --minutes are
over.  Ratios are of medians over rounds in which the sides take turns, since machines are noisy;
shares are of what this machine reaches in a matrix product and a copy; errors are the largest of
value and gradients against float64.  The peers (transformers, trl, datasets, gguf,
llama-cpp-python, flash-attn 3 and 4, Liger) are needed here only; a row or section says which is
missing.
"""

import argparse
import copy
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from candidates import autocast, make_pool
from config import Config
from data import Batch
from kernels import attention, difference
from kernels.logprob import linear_logprob
from model import Llama, ModelConfig, preset, save_model
from objectives import dpo_loss
from optimizer import make_optimizer
from rollout import PrefixCache, sample_rollouts, uniforms
from support import command
from support.runlog import Clock
from tools.bench_llama_cpp import llama_cpp_sampler
from tools.cost import flops, memory, parameters
from update import pick
from update import update as update_policy

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
FLASH_ATTN = ("flash_attn_interface", "flash_attn.cute")  # 3 and 4
SDPA = ("CUDNN_ATTENTION", "FLASH_ATTENTION") if CUDA else ("MATH",)


# ---- Measuring ---------------------------------------------------------------------------------


def seconds(run) -> float:
    """Of one call: on a GPU the median of some, where they are short; on a CPU with one thread CPU
    time, which other programs disturb less."""
    alone = not CUDA and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    began = clock()
    run()
    if CUDA:
        torch.cuda.synchronize()
        if clock() - began < 0.5:
            from triton.testing import do_bench

            return do_bench(run, warmup=10, rep=60, return_mode="median") / 1000
    return clock() - began


@cache
def reached() -> dict[str, float]:
    """What this machine reaches a second: TFLOP of a square matrix product, GB of a copy."""
    n, size = (8192, 1 << 30) if CUDA else (512, 1 << 24)
    square = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    product, copied = partial(torch.mm, square, square), partial(source.clone().copy_, source)
    fastest = lambda run: min(seconds(run) for _ in range(3))  # noqa: E731
    return {"TFLOP": 2e-12 * n**3 / fastest(product), "GB": 2e-9 * size / fastest(copied)}


def in_turns(
    what: str, sides: dict[str, Callable], rounds: int = 2, facts=lambda side: {}, **work: float
) -> Iterator[dict]:
    """A row a side, ours first: median seconds of rounds in which the sides take turns, the first
    of which only warms up. work: what a call does (TFLOP, GB, tokens); facts(side): more to say."""
    found: dict[str, list] = {side: [] for side in sides}
    more = {}
    for turn in range(rounds + 1):
        for side, run in sides.items():
            try:
                found[side].append(seconds(run))
                more[side] = facts(side) if turn == rounds else {}
            except Exception as e:  # a peer that is not here, or that this card cannot run
                if side == "ours":
                    raise
                found[side].append(f"{type(e).__name__} {str(e)[:80]!r}")
    for side, values in found.items():
        if isinstance(values[-1], str):
            yield dict(what=what, side=f"{side}: {values[-1]}")
            continue
        took = statistics.median(values[1:])
        row = dict(what=what, side=side, seconds=took)
        row["ours_is_faster_by"] = took / statistics.median(found["ours"][1:])
        for unit, amount in work.items():
            row[f"{unit}_per_second"] = amount / took
            if unit in reached():
                row["share"] = amount / took / reached()[unit]
        yield row | more[side]


def peak_gb(run) -> float:
    """Most memory that tensors hold at once in a call; on a CPU without those made before it."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 1e9
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 1e9


# ---- The kernels -------------------------------------------------------------------------------


def normal(*shape) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)


def both_ways(run, leaves, upstream, *rest):
    """A function of nothing: run(*leaves, *rest) and its gradients."""
    return lambda: torch.autograd.grad(run(*leaves, *rest), leaves, upstream)


def error(run, exact, *inputs) -> float:
    """Of value and gradients against exact in float64, relative to the largest magnitude."""
    device = torch.device(DEVICE)
    return difference(run, exact, lambda _: inputs, device, DTYPE, (), torch.float64)


def flex_attention(backend, P, N, T):
    """FlexAttention with the same mask, compiled: the general tool for this geometry."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        return (j <= i) & ((j < P) | ((i - P) // N == (j - P) // N))

    mask = create_block_mask(visible, None, None, T, T, device=DEVICE)
    attend = torch.compile(flex_attention) if CUDA else flex_attention
    return partial(attend, block_mask=mask, kernel_options={"BACKEND": backend})


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flash_attn(module, q, k, v):
    """FlashAttention 3 or 4: [B, T, H, D], and 3 may return more than the output."""
    attend = importlib.import_module(module).flash_attn_func
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def training_rows(B, H, D, P, N, C):
    """Attention of training rows.  SDPA and flash-attn, which know no shared prefix, compute every
    continuation with its own copy of it."""

    def heads(rows, T):  # as a model's projections give them: [rows, H, T, D]
        return [normal(rows, T, H, D).transpose(1, 2) for _ in "qkv"]

    T, pad = P + C * N, torch.zeros(B, dtype=torch.int32, device=DEVICE)
    row, apart = heads(B, T), heads(B * C, P + N)
    layout: dict = dict(pad=pad, prefix=P, length=N)
    exact = partial(attention.prefix_attention_torch, **layout)
    peers = {"ours": (partial(attention.prefix_attention, **layout), row, exact)}
    for backend in ("TRITON", "FLASH"):
        flex = flex_attention(backend, P, N, T)
        peers[f"FlexAttention {backend}, same mask"] = flex, row, exact
    separate = {name: partial(sdpa, getattr(SDPBackend, name)) for name in SDPA}
    separate |= {name: partial(flash_attn, name) for name in FLASH_ATTN}
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    peers |= {f"{name}, rows apart": (run, apart, causal) for name, run in separate.items()}

    def facts(side):
        run, given, exact = peers[side]
        few = given if given is row else [x[:1] for x in given]  # float64 takes memory
        return {"error": error(run, exact, *few)}

    pairs = P * (P + 1) / 2 + C * (N * P + N * (N + 1) / 2)  # of a query and a key that it sees
    work = 4e-12 * B * H * D * pairs
    forward, both = {}, {}
    for peer, (run, given, _) in peers.items():
        forward[peer] = torch.no_grad()(partial(run, *given))
        both[peer] = both_ways(run, given, given[0].detach())  # any gradient of the output
    yield in_turns(f"attention C={C} forward", forward, facts=facts, TFLOP=work)
    yield in_turns(f"attention C={C} both ways", both, facts=facts, TFLOP=3.5 * work)


def decoding(B, H, D, P, N, K):
    """Attention of a decoding step with full caches: a layer's, in a CUDA graph as the sampler."""
    sizes = (B, K, H, D), (2, B, H, P, D), (2, B, K, H, N, D)
    q, prefix, cont = (normal(*size).detach() for size in sizes)
    pad = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    filled = torch.full((1,), N, dtype=torch.int32, device=DEVICE)
    copies = prefix[:, :, None].expand(-1, -1, K, -1, -1, -1)
    full = torch.cat((copies, cont), 4).flatten(1, 2)  # [2, B*K, H, P + N, D]
    causal = F.scaled_dot_product_attention
    ours = attention.decode_attention, attention.decode_attention_torch
    peers = {
        "ours": (*ours, (q, *prefix, pad, *cont, filled)),
        "SDPA, expanded caches": (causal, causal, (q.flatten(0, 1)[:, :, None], *full)),
    }
    sides = {peer: partial(run, *given) for peer, (run, _, given) in peers.items()}
    for side, run in sides.items() if CUDA else ():
        run()  # compiled before the capture
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            run()
        sides[side] = graph.replay
    facts = lambda side: {"error": error(*peers[side][:2], *peers[side][2])}  # noqa: E731
    read = (prefix.numel() + cont.numel()) * q.element_size()  # each once
    yield in_turns("decoding, a layer", sides, facts=facts, GB=read / 1e9)


def all_logits(hidden, weight, targets):
    z = hidden @ weight.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # [T, V]
    return -F.cross_entropy(z, targets, reduction="none")


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def torch_chunks(hidden, weight, targets):
    how = torch.nn.LinearCrossEntropyOptions()  # PyTorch 2.13
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=how)


def logprob(tokens, d, V):
    """Log-probabilities forward and backward, tokens weighted as by an objective, and the memory
    that they take. Who gathers gradients for equal weights shows it in the error."""
    leaves, upstream = (normal(tokens, d), normal(V, d)), torch.randn(tokens, device=DEVICE)
    targets = torch.randint(V, (tokens,), device=DEVICE)
    peers = {"ours": linear_logprob, "all logits": all_logits, "Liger": liger}
    peers |= {"linear_cross_entropy": torch_chunks}
    if CUDA:
        peers["all logits, torch.compile"] = torch.compile(all_logits)
    runs = {peer: both_ways(run, leaves, upstream, targets) for peer, run in peers.items()}

    def facts(side):
        wrong = error(peers[side], all_logits, *leaves, targets)
        return dict(error=wrong, peak_gb=peak_gb(runs[side]))

    work = 3 * 2e-12 * tokens * d * V
    yield in_turns(f"logprob V={V} both ways", runs, facts=facts, TFLOP=work)


def kernels() -> Iterator[Iterable[dict]]:
    """What matters most first: on a GPU the paper's sizes in bfloat16; on a CPU small ones through
    the PyTorch definitions, so that every line here has run before a GPU sees it."""
    B, H, D, P, N, K = (4, 16, 128, 1920, 128, 16) if CUDA else (2, 4, 64, 96, 32, 4)
    tokens, d, few, many = (2048, 2048, 32_000, 128_256) if CUDA else (128, 128, 300, 2048)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    yield [dict(what=name) | {f"{unit}_per_second": most for unit, most in reached().items()}]
    yield from training_rows(B, H, D, P, N, 2)
    yield from logprob(tokens, d, few)
    yield from decoding(B, H, D, P, N, K)
    yield from training_rows(B, H, D, P, N, K)
    yield from logprob(tokens, d, many)


# ---- Beside other libraries, on a CPU ------------------------------------------------------------


def small_llama(layers: int, seed: int = 0) -> Llama:
    """Small enough for a CPU, shaped like a Llama: width 512, GQA, 8,192 tokens."""
    shape = ModelConfig(8192, layers, n_head=8, n_kv_head=4, d_model=512, d_ff=1408, head_dim=64)
    return Llama(shape).initialise(seed)


def peer_of(ours: Llama):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def sampler(K: int = 16, N: int = 64):
    """K rollouts of N tokens: ours and transformers' generate, whose static cache is the faster of
    its two, of 1 and of 4 prefixes; ours and llama.cpp, of SmolLM2-135M's shape."""
    small = small_llama(layers=8)
    theirs = peer_of(small)
    how = dict(do_sample=True, top_k=0, max_new_tokens=N, num_return_sequences=K)
    how |= dict(pad_token_id=0, eos_token_id=None, cache_implementation="static")

    def drawn(B, P):
        return torch.randint(8000, (B, P), generator=torch.Generator().manual_seed(P))

    def ours(model, prefix):
        pad, index = prefix.new_zeros(len(prefix), dtype=torch.int32), torch.arange(len(prefix))
        return partial(sample_rollouts, model, prefix, pad, K, N, eos=-1, seed=0, index=index)

    for B, P in ((1, 256), (4, 256), (1, 1024), (4, 1024)):
        prefix = drawn(B, P)
        peer = partial(theirs.generate, prefix, attention_mask=torch.ones_like(prefix), **how)
        sides = {"ours": ours(small, prefix), "transformers": peer}
        yield in_turns(f"{K} rollouts of {N}: B={B} P={P}", sides, rounds=5, tokens=B * K * N)
    large = Llama(preset("smollm2-135m", 49152)).initialise(0)
    for P in (256, 1024):
        prefix, sides = drawn(1, P), {"ours": ours(large, drawn(1, P))}
        for kind in ("float32", "float16"):
            peer = llama_cpp_sampler(large, kind, prefix[0], uniforms(0, torch.arange(1), K, N)[0])
            sides[f"llama.cpp, {kind} weights"] = peer
        yield in_turns(f"{K} rollouts of {N}: 135M, P={P}", sides, rounds=5, tokens=K * N)


def trl_dpo(policy: Llama, reference: Llama, pair: torch.Tensor, P: int):
    """TRL's DPOTrainer: its loss on its padded pairs [2, P + N], and the gradients."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b", pad_token="b")
    rows = Dataset.from_dict(dict(prompt=["a"], chosen=["a"], rejected=["a"]))
    # checkpointing would compute every layer twice
    how = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[])
    given = peer_of(policy), peer_of(reference), DPOConfig(tempfile.mkdtemp(), **how)
    trainer = DPOTrainer(*given, train_dataset=rows, processing_class=words)
    model = trainer.model.train()
    own = (torch.arange(pair.shape[1]) >= P).long().expand_as(pair)
    inputs = dict(input_ids=pair, attention_mask=torch.ones_like(pair), completion_mask=own)

    def run() -> float:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


def update():
    """A DPO pair, policy and reference: forward and backward."""
    policy, reference = small_llama(4), small_llama(4, seed=1)
    tokens = partial(torch.randint, 8000, generator=torch.Generator().manual_seed(0))

    def dpo(prefix, continuations) -> float:
        layout = prefix, torch.zeros(len(prefix), dtype=torch.int32), continuations
        with torch.no_grad():
            before = reference.logprobs(*layout).sum(dim=2)
        scores = policy.logprobs(*layout).sum(dim=2)
        loss = dpo_loss((scores - before).view(-1, 2), 0.1).sum()
        loss.backward()
        policy.zero_grad()
        return loss.item()

    prefix, pair = tokens((1, 1920)), tokens((1, 2, 128))
    apart = prefix.expand(2, -1), pair.transpose(0, 1)
    sides = {
        "ours": partial(dpo, prefix, pair),
        "TRL": trl_dpo(policy, reference, torch.cat((apart[0], apart[1][:, 0]), 1), 1920),
        "ours, a row each": partial(dpo, *apart),
    }
    values = [run() for run in sides.values()]
    assert max(values) - min(values) < 1e-3, values  # the same loss
    memory = lambda side: {"peak_gb": peak_gb(sides[side])}  # noqa: E731
    yield in_turns("DPO pair P=1920 N=128", sides, rounds=5, facts=memory)


def one_step(shape: ModelConfig, B: int, P: int, N: int, K: int, processes: int = 1):
    """A whole step of DPO on rollouts with rewards that cost nothing, as (its config, what it
    holds, a function of nothing that does this process's part of it)."""
    size = dict(rollouts=K, chunk=N, max_seq=P + N, batch_size=B, baseline=False, gpus=processes)
    config = Config(candidates="rollouts", learning_rate=1e-5, **size)
    reference = Llama(shape).initialise(0).to(DEVICE)
    held = SimpleNamespace(policy=copy.deepcopy(reference), clock=Clock())
    optimizer, tokenizer = make_optimizer(held.policy, config), SimpleNamespace(eos=1, decode=str)
    mine = B // processes
    prefix = torch.randint(2, shape.vocab_size, (mine, P), device=DEVICE)
    pad, suffix = prefix.new_zeros(mine, dtype=torch.int32), prefix.new_zeros(mine, N)
    batch = Batch(prefix, pad, suffix, torch.arange(mine), [""] * mine, [], {})
    held.sample = lambda: make_pool(held.policy, batch, None, config, tokenizer, held.clock)

    def run():
        held.clock = Clock()
        pool = held.sample()
        reward = torch.rand(mine, K, dtype=torch.float64)
        with held.clock("update"):
            picked = pick(pool, reward, config)
            update_policy(held.policy, reference, optimizer, pool, picked, reward, 5, config)

    return config, held, run


def inference(config: Config, held) -> Iterator[dict]:
    """Of the policy that samples: its log-probabilities beside the trainer's, and a decoding step
    with and without its CUDA graph."""
    with torch.no_grad(), autocast(config, torch.device(DEVICE)):  # as the sampler computes
        pool = held.sample()
        layout = pool.batch.prefix, pool.batch.pad
        gap = (held.policy.logprobs(*layout, pool.tokens, pool.lengths) - pool.old).abs()
        mean, most = float(gap.sum() / pool.lengths.sum()), float(gap.max())
        yield dict(what="log-probability, sampler against trainer", mean=mean, most=most)
        cached = PrefixCache(held.policy, *layout, config.rollouts, config.chunk)
        cached.at.fill_(config.chunk // 2)
        sides = {"ours": cached.replay or cached.compute, "no CUDA graph": cached.compute}
        weights = parameters(held.policy.config) * cached.prefix.element_size()
        read = weights + cached.prefix.nbytes
        yield from in_turns("decoding step, half full", sides, GB=read / 1e9)


def step():
    """That of a small policy; on a GPU of the paper's: seconds by stage, and its memory, which has
    to be within 15 % of the forecast."""
    small = ModelConfig(8192, 2, 4, 2, d_model=256, d_ff=704, head_dim=64)
    shape, sizes = small, (4, 256, 32, 4)
    if CUDA:
        shape, sizes = preset("llama-1.4b", 32000), (16, 1920, 128, 16)
    made: list = []

    def twice():  # Adam's moments are there from the second on
        made.extend(one_step(shape, *sizes))
        made[-1](), made[-1]()

    peak = peak_gb(twice)
    config, held, run = made
    forecast = memory(config, shape, bf16=CUDA)["most at once"] / 1e9
    stages = lambda side: held.clock | dict(peak_gb=peak, forecast_gb=forecast)  # noqa: E731
    what = f"step of {parameters(shape) / 1e6:.0f}M, B P N K {sizes}"
    yield in_turns(what, {"ours": run}, facts=stages)
    yield inference(config, held)
    if abs(peak / forecast - 1) > 0.15:
        raise AssertionError(f"--dry_run says {forecast:.3g} GB, the step held {peak:.3g}")


# ---- How a step grows ----------------------------------------------------------------------------

USUAL = dict(K=4, N=32, P=256, layers=2, processes=1)
OTHERS = dict(K=(8, 16), N=(64, 128), P=(512, 1024), layers=(4, 8), processes=(2, 4))


def growing(size: dict):
    """The shape, config and step of 4 prefixes at a size like USUAL."""
    shape = ModelConfig(8192, size["layers"], 4, 2, d_model=256, d_ff=704, head_dim=64)
    return shape, *one_step(shape, 4, *(size[name] for name in ("P", "N", "K", "processes")))


def measured(rank: int, size: dict, folder: str):
    """One of the processes that share a step: its CPU seconds and memory, into a file."""
    if (count := size["processes"]) > 1:
        where = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", where, rank=rank, world_size=count)
    shape, _, _, run = growing(size)
    run()
    took = statistics.median(seconds(run) for _ in range(5))
    held = 16 * parameters(shape) / 1e9  # policy, reference and two moments; gradients come and go
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump((took, held + peak_gb(run)), file)


def growth():
    """A step beside what --dry_run says of it, one size changed at a time: of the slowest process
    the CPU seconds, and of each the memory of weights and tensors."""
    first: dict = {}
    for change in ({}, *({name: n} for name, several in OTHERS.items() for n in several)):
        size = USUAL | change
        with tempfile.TemporaryDirectory() as folder:
            start = torch.multiprocessing.start_processes
            start(measured, (size, folder), size["processes"], start_method="fork")
            files = [path.read_text() for path in Path(folder).glob("*.json")]
        took, peak = map(max, zip(*map(json.loads, files), strict=True))
        shape, config, *_ = growing(size)
        work = sum(flops(config, shape).values()) / size["processes"] / 1e9
        first = first or dict(seconds=took, gflop=work)
        row = dict(what=" ".join(f"{k}={v}" for k, v in change.items()) or str(USUAL))
        row |= dict(seconds=took, times=took / first["seconds"])
        row |= dict(gflop=work, forecast_times=work / first["gflop"])
        forecast = memory(config, shape, bf16=False)["most at once"] / 1e9
        yield [row | dict(peak_gb=peak, forecast_gb=forecast)]


SECTIONS = {f.__name__: f for f in (kernels, sampler, update, step, growth)}


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no new row is begun")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with open("bench.jsonl", "a", encoding="utf-8") as file:
        for name in given.sections or SECTIONS:
            try:
                for rows in SECTIONS[name]():
                    if time.monotonic() > end:
                        print(f"{name}: the rest is left out, the time is over")
                        break
                    for row in rows:
                        print(json.dumps({"section": name} | row), file=file, flush=True)
                        shown = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
                        print(*(f"{k} {v}" for k, v in zip(row, shown, strict=True)), sep="  ")
            except ImportError as e:
                print(f"{name}: peer not installed, {e}")


if __name__ == "__main__":
    command.run(main)
