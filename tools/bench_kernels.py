"""The section `kernels` of tools/bench.py, and how all of its sections measure.

    python -m tools.bench kernels --minutes 8

In: on a GPU the paper's sizes in bfloat16; on a CPU small ones in float32, through the PyTorch
definitions, so that every line here has run before a GPU sees it.  Out: a dict a measurement, what
matters most first.  An error is the largest against float64, relative to the largest magnitude.  A
peer that is not installed, or cannot run here, loses its row only.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels import attention as A
from kernels.logprob import linear_logprob

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


def worst(values, exact) -> float:
    errors = []
    for a, b in zip(values, exact, strict=True):
        errors.append((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
    return torch.stack(errors).max().item()


# ---- The kernels -------------------------------------------------------------------------------


@dataclass
class Sizes:
    """The paper's policy (16 heads of 128) and its step: prefixes of 1,920, N = 128, K = 16."""

    B: int = 4  # prefixes
    H: int = 16  # heads of queries, and of keys
    Hkv: int = 16
    D: int = 128
    P: int = 1920
    N: int = 128
    K: int = 16
    tokens: int = 2048  # of one log-probability
    dim: int = 2048
    vocabularies: tuple = (32_000, 128_256)


SMALL = Sizes(2, 4, 2, 64, 96, 32, 4, 128, 128, (2048,))


def flex_attention(pad, P, N, T):
    """FlexAttention with the same mask, compiled: the general tool for this geometry."""
    from torch._functorch import config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        own = (i - P) // max(N, 1) == (j - P) // max(N, 1)
        return (j >= pad[b]) & (j <= i) & ((j < P) | own)

    functorch.donated_buffer = False  # its backward pass is timed again and again
    mask = create_block_mask(visible, len(pad), None, T, T, device=pad.device)
    return partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def backward(run, given):
    """A function of nothing: the gradients of run(*given)."""

    @cache
    def forward():  # in the first turn, which only warms up
        out = run(*given)
        return out, torch.randn_like(out)

    return lambda: torch.autograd.grad(forward()[0], given, forward()[1], retain_graph=True)


def attention(s: Sizes, C: int):
    """A training row.  SDPA, which knows no shared prefix, computes every continuation with its
    own copy of it."""

    def draw(rows, T):
        heads = (
            torch.randn(rows, T, h, s.D, device=DEVICE, dtype=DTYPE) for h in (s.H, s.Hkv, s.Hkv)
        )
        return [x.transpose(1, 2).requires_grad_() for x in heads]  # [rows, heads, T, D]

    pad = torch.zeros(s.B, dtype=torch.int32, device=DEVICE)
    T = s.P + C * s.N
    ours, row, apart = (
        partial(A.prefix_attention, pad=pad, prefix=s.P, length=s.N),
        *(draw(*size) for size in ((s.B, T), (s.B * C, s.P + s.N))),
    )
    peers = {"ours": (ours, row)}
    backends = dict(flash=SDPBackend.FLASH_ATTENTION, cuDNN=SDPBackend.CUDNN_ATTENTION)
    for name, backend in (backends if CUDA else {"math": SDPBackend.MATH}).items():
        peers[f"SDPA {name}, rows apart"] = partial(sdpa, backend), apart
    if CUDA:  # FlexAttention has no backward on a CPU
        peers["FlexAttention, same mask"] = flex_attention(pad, s.P, s.N, T), row
    # 1. The errors, by the first row in float64.
    double = [x[:1].detach().double().requires_grad_() for x in row]
    exact, out = A.prefix_attention_torch(*double, pad[:1], s.P, s.N), ours(*row)
    upstream = torch.randn_like(out)
    true = torch.autograd.grad(exact, double, upstream[:1].double())
    found = [x[:1] for x in torch.autograd.grad(out, row, upstream)]
    # 2. Forward, then backward; the FLOPs are what the geometry needs, whoever computes it.
    flop = 4 * s.B * s.H * s.D * (s.P * (s.P + 1) // 2 + C * (s.N * s.P + s.N * (s.N + 1) // 2))
    runs = {peer: partial(run, *given) for peer, (run, given) in peers.items()}
    with torch.no_grad():
        error = worst([out[:1]], [exact])
        yield from in_turns(f"attention C={C} forward", runs, flop=flop, error=error)
    runs = {peer: backward(*peers[peer]) for peer in peers}
    more = dict(flop=flop * 5 // 2, error=worst(found, true))
    yield from in_turns(f"attention C={C} backward", runs, **more)


@torch.no_grad()
def decoding(s: Sizes):
    """Attention of a decoding step with full caches: a layer's."""
    draw = partial(torch.randn, device=DEVICE, dtype=DTYPE)
    q = draw(s.B, s.K, s.H, s.D)
    prefix = [draw(s.B, s.Hkv, s.P, s.D) for _ in "kv"]
    cont = [draw(s.B, s.K, s.Hkv, s.N, s.D) for _ in "kv"]
    pad = torch.zeros(s.B, dtype=torch.int32, device=DEVICE)
    filled = torch.full((1,), s.N, dtype=torch.int32, device=DEVICE)
    full = [
        torch.cat([p[:, None].expand(-1, s.K, -1, -1, -1), c], 3).flatten(0, 1)
        for p, c in zip(prefix, cont, strict=True)
    ]  # [B*K, Hkv, P + N, D]: what a sampler without shared prefixes keeps
    ours = partial(A.decode_attention, q, *prefix, pad, *cont, filled)
    query = q.flatten(0, 1)[:, :, None]  # [B*K, H, 1, D]
    theirs = partial(F.scaled_dot_product_attention, query, *full, enable_gqa=True)
    inputs = [x[:1].double() for x in (q, *prefix, *cont)]
    exact = A.decode_attention_torch(*inputs[:3], pad[:1], *inputs[3:], s.N)
    more = dict(error=worst([ours()[:1]], [exact]))
    more["bytes"] = sum(x.numel() * x.element_size() for x in (*prefix, *cont))  # each read once
    sides = {"ours": ours, "SDPA, expanded caches": theirs}
    yield from in_turns("decoding, a layer", {k: replayed(v) for k, v in sides.items()}, **more)


def replayed(run):
    """`run` captured in a CUDA graph, as the sampler does: launches cost more than the work."""
    if not CUDA:
        return run
    graph = torch.cuda.CUDAGraph()
    run()  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def all_logits(hidden, weight, targets):
    logits = hidden @ weight.T
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1)


def logprob(s: Sizes, V: int):
    """Log-probabilities forward and backward, and the memory that they take."""
    hidden = torch.randn(s.tokens, s.dim, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(V, s.dim, device=DEVICE, dtype=DTYPE).mul_(s.dim**-0.5).requires_grad_()
    targets = torch.randint(V, (s.tokens,), device=DEVICE)

    def both(function, h, w, t):
        value = function(h, w, t)
        return value, *torch.autograd.grad(value.sum(), (h, w))

    peers = {"ours": linear_logprob, "all logits": all_logits}
    if CUDA:
        peers["all logits, torch.compile"] = torch.compile(all_logits)
        peers["Liger, their sum"] = liger
    some = slice(0, 64)  # the errors of 64 tokens
    inputs = [x.detach() for x in (hidden[some], weight)]
    found = both(linear_logprob, *(x.requires_grad_() for x in inputs), targets[some])
    double = (x.double().detach().requires_grad_() for x in inputs)
    more = dict(error=worst(found, both(all_logits, *double, targets[some])))
    more["flop"] = 6 * s.tokens * s.dim * V  # of three products, without what is computed again
    runs = {peer: partial(both, run, hidden, weight, targets) for peer, run in peers.items()}
    for row in in_turns(f"logprob V={V} both ways", runs, **more):
        yield row | ({"peak_gb": peak_gb(runs[row["side"]])} if row["side"] in runs else {})


def liger(hidden, weight, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


# ---- The order ---------------------------------------------------------------------------------


def rows(minutes: float = 8.0, sizes: Sizes | None = None) -> Iterator[dict]:
    """One dict a measurement, ours first in each section, what matters most first."""
    s, began = sizes or (Sizes() if CUDA else SMALL), time.monotonic()
    path = "Triton" if kernels.use_triton(torch.empty(0, device=DEVICE, dtype=DTYPE)) else "PyTorch"
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    a = torch.randn(8192 if CUDA else 512, 8192 if CUDA else 512, device=DEVICE, dtype=DTYPE)
    product = 2 * len(a) ** 3 / seconds(lambda: a @ a) / 1e12
    yield dict(what=f"{machine}, torch {torch.__version__}, ours = {path}", product_tflops=product)
    work = [partial(attention, s, 2), partial(logprob, s, s.vocabularies[0]), partial(decoding, s)]
    work += [partial(attention, s, s.K), partial(logprob, s, s.vocabularies[-1])]
    for n, section in enumerate(work):
        if time.monotonic() - began > 60 * minutes:
            yield dict(what=f"the minutes are over: without the last {len(work) - n} sections")
            return
        yield from section()
        if CUDA:
            torch.cuda.empty_cache()
