"""Ours beside what one would use instead: same weights, same tokens, one machine, one run.

    python -m tools.bench                          all sections
    python -m tools.bench sampler update           against transformers and TRL, on a CPU
    python -m tools.bench growth                   what costs how much, beside --dry_run's forecast
    python -m tools.bench kernels step             the first thing to run on a GPU (docs/gpu.md)

Out: a line a measurement, each written to bench.jsonl as well when it is made.  Ratios are of
medians over rounds in which the sides take turns, since machines are noisy.  The peers
(transformers, trl, datasets) are needed here only; a section without its peer says so.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from candidates import make_pool
from config import Config
from data import Batch
from kernels import attention
from kernels.logprob import linear_logprob
from model import Llama, ModelConfig, preset, save_model
from objectives import dpo_loss
from optimizer import make_optimizer
from rollout import sample_rollouts
from support import command
from support.runlog import Clock
from tools.cost import flops, memory, parameters
from update import pick
from update import update as update_policy

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


# ---- Measuring ---------------------------------------------------------------------------------


def seconds(run) -> float:
    """Of one call: the median of some on a GPU; on a CPU with one thread CPU time, which other
    programs disturb less."""
    if CUDA:
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=60, return_mode="median") / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


def in_turns(what: str, sides: dict[str, Callable], rounds: int = 2, **ours) -> Iterator[dict]:
    """A row a side, ours first: median seconds of rounds in which the sides take turns, the first
    of which only warms up. `ours` are more facts about ours."""
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            try:
                found[side].append(seconds(run))
            except Exception as e:  # a peer that this card or its version cannot run
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
        yield row | (ours if side == "ours" else {})


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


def both_ways(run, leaves, *rest):
    """A function of nothing: run(*leaves, *rest) and its gradients."""
    return lambda: torch.autograd.grad(run(*leaves, *rest).sum(), leaves)


def flex_attention(P, N, T):
    """FlexAttention with the same mask, compiled: the general tool for this geometry."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        return (j <= i) & ((j < P) | ((i - P) // N == (j - P) // N))

    mask = create_block_mask(visible, None, None, T, T, device=DEVICE)
    return partial(torch.compile(flex_attention), block_mask=mask)


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def training_rows(B, H, D, P, N, C):
    """Attention of training rows.  SDPA, which knows no shared prefix, computes every continuation
    with its own copy of it."""

    def heads(rows, T):  # as a model's projections give them: [rows, H, T, D]
        return [normal(rows, T, H, D).transpose(1, 2) for _ in "qkv"]

    T, pad = P + C * N, torch.zeros(B, dtype=torch.int32, device=DEVICE)
    row, apart = heads(B, T), heads(B * C, P + N)
    peers = {"ours": (partial(attention.prefix_attention, pad=pad, prefix=P, length=N), row)}
    backends = dict(flash=SDPBackend.FLASH_ATTENTION, cuDNN=SDPBackend.CUDNN_ATTENTION)
    for name, backend in (backends if CUDA else {"math": SDPBackend.MATH}).items():
        peers[f"SDPA {name}, rows apart"] = partial(sdpa, backend), apart
    if CUDA:  # FlexAttention has no backward on a CPU
        peers["FlexAttention, same mask"] = flex_attention(P, N, T), row
    with torch.no_grad():
        runs = {peer: partial(run, *given) for peer, (run, given) in peers.items()}
        yield from in_turns(f"attention C={C} forward", runs)
    runs = {peer: both_ways(*given) for peer, given in peers.items()}
    yield from in_turns(f"attention C={C} both ways", runs)


@torch.no_grad()
def decoding(B, H, D, P, N, K):
    """Attention of a decoding step with full caches: a layer's, in a CUDA graph as the sampler."""
    q, prefix, cont = normal(B, K, H, D), normal(2, B, H, P, D), normal(2, B, K, H, N, D)
    pad = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    filled = torch.full((1,), N, dtype=torch.int32, device=DEVICE)
    copies = prefix[:, :, None].expand(-1, -1, K, -1, -1, -1)
    full = torch.cat((copies, cont), 4).flatten(1, 2)  # [2, B*K, H, P + N, D]
    sides = {
        "ours": partial(attention.decode_attention, q, *prefix, pad, *cont, filled),
        "SDPA, expanded caches": partial(
            F.scaled_dot_product_attention, q.flatten(0, 1)[:, :, None], *full
        ),
    }
    for side, run in sides.items() if CUDA else ():
        run()  # compiled before the capture
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            run()
        sides[side] = graph.replay
    read = (prefix.numel() + cont.numel()) * q.element_size()  # each once
    yield from in_turns("decoding, a layer", sides, bytes=read)


def all_logits(hidden, weight, targets):
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def logprob(tokens, d, V):
    """Log-probabilities forward and backward, and the memory that they take."""
    leaves = normal(tokens, d), normal(V, d)
    targets = torch.randint(V, (tokens,), device=DEVICE)
    peers = {"ours": linear_logprob, "all logits": all_logits}
    if CUDA:
        peers["all logits, torch.compile"] = torch.compile(all_logits)
    runs = {peer: both_ways(run, leaves, targets) for peer, run in peers.items()}
    for row in in_turns(f"logprob V={V} both ways", runs):
        yield row | ({"peak_gb": peak_gb(runs[row["side"]])} if row["side"] in runs else {})


def kernels() -> Iterator[dict]:
    """What matters most first: on a GPU the paper's sizes in bfloat16; on a CPU small ones through
    the PyTorch definitions, so that every line here has run before a GPU sees it."""
    B, H, D, P, N, K = (4, 16, 128, 1920, 128, 16) if CUDA else (2, 4, 64, 96, 32, 4)
    tokens, d, few, many = (2048, 2048, 32_000, 128_256) if CUDA else (128, 128, 300, 2048)
    yield dict(what=torch.cuda.get_device_name() if CUDA else "CPU")
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
def sampler():
    """16 rollouts of 64 tokens of 1 and of 4 prefixes: ours and transformers' generate, whose
    static cache is the faster of its two."""
    ours, K, N = small_llama(layers=8), 16, 64
    theirs = peer_of(ours)
    how = dict(do_sample=True, top_k=0, max_new_tokens=N, num_return_sequences=K)
    how |= dict(pad_token_id=0, eos_token_id=None, cache_implementation="static")
    for B, P in ((1, 256), (4, 256), (1, 1024), (4, 1024)):
        prefix = torch.randint(8000, (B, P), generator=torch.Generator().manual_seed(P))
        pad, mask = torch.zeros(B, dtype=torch.int32), torch.ones_like(prefix)
        keyed = dict(eos=-1, seed=0, index=torch.arange(B))
        sides = {
            "ours": partial(sample_rollouts, ours, prefix, pad, K, N, **keyed),
            "transformers": partial(theirs.generate, prefix, attention_mask=mask, **how),
        }
        for row in in_turns(f"{K} rollouts of {N}: B={B} P={P}", sides):
            yield row | {"tokens_per_second": B * K * N / row["seconds"]}


def trl_dpo(policy: Llama, reference: Llama, pair: torch.Tensor, P: int):
    """TRL's DPOTrainer: its loss on its padded pairs [2, P + N], and the gradients."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    trainer = DPOTrainer(
        peer_of(policy),
        peer_of(reference),
        # Checkpointing would compute every layer twice.
        DPOConfig(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[]
        ),
        train_dataset=Dataset.from_dict(dict(prompt=["a"], chosen=["a"], rejected=["a"])),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="b", pad_token="b"
        ),
    )
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
        loss = dpo_loss(scores.view(-1, 2), before.view(-1, 2), 0.1).sum()
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
    for row in in_turns("DPO pair P=1920 N=128", sides):
        yield row | {"peak_gb": peak_gb(sides[row["side"]])}


def one_step(shape: ModelConfig, B: int, P: int, N: int, K: int, processes: int = 1):
    """A whole step of DPO on rollouts with rewards that cost nothing, as (its config, a function of
    nothing that does this process's part of it)."""
    size = dict(rollouts=K, chunk=N, max_seq=P + N, batch_size=B, baseline=False, gpus=processes)
    config = Config(candidates="rollouts", learning_rate=1e-5, **size)
    reference = Llama(shape).initialise(0).to(DEVICE)
    policy = copy.deepcopy(reference)
    optimizer, tokenizer = make_optimizer(policy, config), SimpleNamespace(eos=1, decode=str)
    mine = B // processes
    prefix = torch.randint(2, shape.vocab_size, (mine, P), device=DEVICE)
    pad, suffix = prefix.new_zeros(mine, dtype=torch.int32), prefix.new_zeros(mine, N)
    batch = Batch(prefix, pad, suffix, torch.arange(mine), [""] * mine, [], {})

    def run():
        pool = make_pool(policy, batch, None, config, tokenizer, Clock())
        reward = torch.rand(mine, K, dtype=torch.float64)
        picked = pick(pool, reward, config)
        update_policy(policy, reference, optimizer, pool, picked, reward, 5, config)

    return config, run


def step():
    """That of the demo's policy; on a GPU of the paper's, its memory beside the forecast."""
    given = ("llama-1.4b", 32000, 16, 1920, 128, 16) if CUDA else ("world", 846, 32, 64, 32, 4)
    name, V, B, P, N, K = given
    config, run = one_step(shape := preset(name, V), B, P, N, K)
    forecast = memory(config, shape, bf16=CUDA)["most at once"] / 1e9
    more = dict(peak_gb=peak_gb(run), forecast_gb=forecast) if CUDA else {}
    yield from in_turns(f"step of {name} B={B} P={P} N={N} K={K}", {"ours": run}, **more)


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
    shape, _, run = growing(size)
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
        shape, config, _ = growing(size)
        work = sum(flops(config, shape).values()) / size["processes"] / 1e9
        first = first or dict(seconds=took, gflop=work)
        row = dict(what=" ".join(f"{k}={v}" for k, v in change.items()) or str(USUAL))
        row |= dict(seconds=took, times=took / first["seconds"])
        row |= dict(gflop=work, forecast_times=work / first["gflop"])
        forecast = memory(config, shape, bf16=False)["most at once"] / 1e9
        yield row | dict(peak_gb=peak, forecast_gb=forecast)


SECTIONS = {f.__name__: f for f in (kernels, sampler, update, step, growth)}


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    sections = parser.parse_args(arguments).sections or SECTIONS
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with open("bench.jsonl", "a", encoding="utf-8") as file:
        for name in sections:
            try:
                for row in SECTIONS[name]():
                    print(json.dumps({"section": name} | row), file=file, flush=True)
                    shown = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
                    print(*(f"{k} {v}" for k, v in zip(row, shown, strict=True)), sep="  ")
            except ImportError as e:
                print(f"{name}: left out, {e}")


if __name__ == "__main__":
    command.run(main)
