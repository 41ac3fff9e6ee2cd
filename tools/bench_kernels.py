"""The section `kernels` of tools/bench.py: speed, memory and errors of the kernels and of one step.

    python -m tools.bench kernels --minutes 8

In: on a GPU the paper's sizes in bfloat16; on a CPU small ones in float32, through the PyTorch
definitions, so that every line here has run before a GPU sees it.  Out: a dict a measurement, what
matters most first.  Shares are of what this machine reaches in a large matrix product and a large
copy; an error is the largest against float64, relative to the largest magnitude.  A peer that is
not installed, or cannot run here, loses its row only.
"""

import functools
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from config import Config
from kernels import attention as A
from kernels.logprob import linear_logprob
from model import Llama, preset
from objectives import dpo_loss
from rollout import PrefixCache, sample_rollouts
from tools.cost import memory
from update import make_optimizer

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


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
    model: str = "llama-1.4b"


SMALL = Sizes(2, 4, 2, 64, 96, 32, 4, 128, 128, (2048,), "world")


# ---- Measuring ---------------------------------------------------------------------------------


def seconds(run) -> float:
    """Median on a GPU, best of three on a CPU (others use it too)."""
    if CUDA:
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=60, return_mode="median") / 1000
    return min(once(run)[0] for _ in range(3))


def once(run):
    """(seconds, result) of a single call, what it started on the GPU included."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def peak_gb(run) -> dict[str, float]:
    """Most memory of the GPU held at once by a call."""
    if not CUDA:
        run()
        return {}
    torch.cuda.reset_peak_memory_stats()
    run()
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


@functools.cache
def ceilings() -> dict[str, float]:
    """FLOP/s of a large matrix product, bytes/s of a large copy."""
    n, size = (8192, 1 << 30) if CUDA else (512, 1 << 24)
    a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    b = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    return {"TFLOP/s": 2 * n**3 / seconds(lambda: a @ a), "GB/s": 2 * size / seconds(b.clone)}


def worst(value, exact) -> float:
    value, exact = value.detach().double(), exact.detach()
    return ((value - exact).abs().max() / exact.abs().max()).item()


def measure(what: str, peers: dict, work: float, unit: str, error: float) -> Iterator[dict]:
    """A row a peer; `peers` maps names to functions, ours first; `work` in FLOP or bytes."""
    ours = None
    for name, run in peers.items():
        try:
            took = seconds(run)
        except Exception as e:  # a peer that this card or its version cannot run
            if name == "ours":
                raise
            yield dict(what=what, side=f"{name}: {type(e).__name__} {str(e)[:80]!r}")
            continue
        ours = ours or took
        rate, scale = work / took, {"TFLOP/s": 1e12, "GB/s": 1e9}[unit]
        row = dict(what=what, side=name, milliseconds=took * 1e3, ours_is_faster_by=took / ours)
        row |= {unit: rate / scale, "share": rate / ceilings()[unit]}
        yield row | ({"error": error} if name == "ours" else {})


# ---- Attention over training rows --------------------------------------------------------------


def flex_attention(pad, P, N, T):
    """FlexAttention with the same mask, compiled: the general tool for this geometry."""
    from torch._functorch import config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        own = (i - P) // max(N, 1) == (j - P) // max(N, 1)
        return (j >= pad[b]) & (j <= i) & ((j < P) | own)

    functorch.donated_buffer = False  # its backward pass is timed again and again
    mask = create_block_mask(visible, len(pad), None, T, T, device=pad.device)
    return functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)


def sdpa(backend, grouped, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def attention_peers(s: Sizes, C: int, pad) -> dict:
    """name: (function of q, k, v; its inputs).  The peers that know no shared prefix compute every
    continuation with its own copy of it."""
    rows = lambda b, t, h: torch.randn(b, t, h, s.D, device=DEVICE, dtype=DTYPE)  # noqa: E731
    draw = lambda b, t, h: rows(b, t, h).transpose(1, 2).requires_grad_()  # noqa: E731
    together = [draw(s.B, s.P + C * s.N, h) for h in (s.H, s.Hkv, s.Hkv)]
    apart = [draw(s.B * C, s.P + s.N, h) for h in (s.H, s.Hkv, s.Hkv)]
    ours = functools.partial(A.prefix_attention, pad=pad, prefix=s.P, length=s.N)
    peers = {"ours": (ours, together)}
    backends = dict(flash=SDPBackend.FLASH_ATTENTION, cuDNN=SDPBackend.CUDNN_ATTENTION)
    for name, backend in (backends if CUDA else {"math": SDPBackend.MATH}).items():
        run = functools.partial(sdpa, backend, s.Hkv != s.H)
        peers[f"SDPA {name}, rows apart"] = run, apart
    if CUDA:  # FlexAttention has no backward on a CPU
        peers["FlexAttention, same mask"] = (flex_attention(pad, s.P, s.N, s.P + C * s.N), together)
    if CUDA and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        flash = functools.partial(flash_attn_func, causal=True)
        peers["flash-attn, rows apart"] = flash, [x.transpose(1, 2) for x in apart]
    return peers


def attention(s: Sizes, C: int):
    pad = torch.zeros(s.B, dtype=torch.int32, device=DEVICE)
    peers = attention_peers(s, C, pad)
    ours, (q, k, v) = peers["ours"]
    # 1. The errors, by the first row in float64.
    double = [x[:1].detach().double().requires_grad_() for x in (q, k, v)]
    exact, out = A.prefix_attention_torch(*double, pad[:1], s.P, s.N), ours(q, k, v)
    upstream = torch.randn_like(out)
    true = torch.autograd.grad(exact, double, upstream[:1].double())
    found = torch.autograd.grad(out, (q, k, v), upstream)
    errors = [worst(a[:1], b) for a, b in zip((out, *found), (exact, *true), strict=True)]
    # 2. Forward, then backward; the work is what the geometry needs, whoever computes it.
    pairs = s.P * (s.P + 1) // 2 + C * (s.N * s.P + s.N * (s.N + 1) // 2)
    flop = 4 * s.B * s.H * s.D * pairs
    runs = {peer: functools.partial(run, *given) for peer, (run, given) in peers.items()}
    with torch.no_grad():
        yield from measure(f"attention C={C} forward", runs, flop, "TFLOP/s", errors[0])

    def backward(run, given):
        @functools.cache
        def forward():  # in the first turn, which is not timed
            out = run(*given)
            return out, torch.randn_like(out)

        return lambda: torch.autograd.grad(forward()[0], given, forward()[1], retain_graph=True)

    runs = {peer: backward(*peers[peer]) for peer in peers}
    what = f"attention C={C} backward"
    yield from measure(what, runs, flop * 5 // 2, "TFLOP/s", max(errors[1:]))


# ---- Decoding ----------------------------------------------------------------------------------


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


def decoding(s: Sizes):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, dtype=DTYPE)  # noqa: E731
    q = draw(s.B, s.K, s.H, s.D)
    prefix = [draw(s.B, s.Hkv, s.P, s.D) for _ in "kv"]
    cont = [draw(s.B, s.K, s.Hkv, s.N, s.D) for _ in "kv"]
    pad = torch.zeros(s.B, dtype=torch.int32, device=DEVICE)
    filled = torch.full((1,), s.N, dtype=torch.int32, device=DEVICE)
    full = [
        torch.cat([p[:, None].expand(-1, s.K, -1, -1, -1), c], 3).flatten(0, 1)
        for p, c in zip(prefix, cont, strict=True)
    ]  # [B*K, Hkv, P + N, D]: what a sampler without shared prefixes keeps
    query = q.flatten(0, 1)[:, :, None]
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=s.Hkv != s.H)
    peers = {
        "ours": lambda: A.decode_attention(q, *prefix, pad, *cont, filled),
        "SDPA, expanded caches": lambda: attend(query, *full),
    }
    inputs = [x[:1].double() for x in (q, *prefix, *cont)]
    exact = A.decode_attention_torch(*inputs[:3], pad[:1], *inputs[3:], s.N)
    error = worst(peers["ours"]()[:1], exact)
    size = sum(x.numel() * x.element_size() for x in (*prefix, *cont))  # each cache read once
    with torch.no_grad():
        peers = {name: replayed(run) for name, run in peers.items()}
        yield from measure("decoding, a layer", peers, size, "GB/s", error)


# ---- Log-probability ---------------------------------------------------------------------------


def materialised(hidden, weight, targets):
    logits = hidden @ weight.T
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1)


def logprob_peers() -> dict:
    peers = {"ours": linear_logprob, "materialised": materialised}
    if CUDA:
        peers["materialised, torch.compile"] = torch.compile(materialised)
    if CUDA and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")  # weights of tokens: all 1
        peers["Liger, their sum"] = lambda h, w, t: -liger(w, h, t)
    if CUDA and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        cut = functools.partial(linear_cross_entropy, reduction="none", filter_eps=None)
        peers["cut-cross-entropy, unfiltered"] = lambda h, w, t: -cut(h, w, t)
    return peers


def logprob(s: Sizes, V: int):
    hidden = torch.randn(s.tokens, s.dim, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(V, s.dim, device=DEVICE, dtype=DTYPE).mul_(s.dim**-0.5).requires_grad_()
    targets = torch.randint(V, (s.tokens,), device=DEVICE)

    def both(function):
        return lambda: torch.autograd.grad(
            function(hidden, weight, targets).sum(), (hidden, weight)
        )

    # 1. The errors of 64 tokens, forward and backward.
    some = slice(0, 64)
    part, double = hidden[some].detach().requires_grad_(), weight.detach().double().requires_grad_()
    exact_h = part.detach().double().requires_grad_()
    ours = linear_logprob(part, weight, targets[some])
    true = materialised(exact_h, double, targets[some])
    found = torch.autograd.grad(ours.sum(), (part, weight))
    grads = torch.autograd.grad(true.sum(), (exact_h, double))
    errors = [worst(a, b) for a, b in zip((ours, *found), (true, *grads), strict=True)]
    del double, grads, true
    # 2. Both ways; the work is that of three products, without what a path computes again.
    flop, peers = 6 * s.tokens * s.dim * V, logprob_peers()
    runs = {peer: both(function) for peer, function in peers.items()}
    with torch.no_grad():
        forward = {"ours": lambda: linear_logprob(hidden, weight, targets)}
        yield from measure(f"logprob V={V} forward", forward, flop / 3, "TFLOP/s", errors[0])
    for row in measure(f"logprob V={V} both ways", runs, flop, "TFLOP/s", max(errors[1:])):
        yield row | (peak_gb(runs[row["side"]]) if row["side"] in runs else {})


# ---- A whole step ------------------------------------------------------------------------------


def policy_step(s: Sizes, V: int, B: int):
    """The policy's part of a step on B prefixes: K rollouts of each, then DPO on two of them."""
    with torch.device(DEVICE):
        policy, reference = (Llama(preset(s.model, V)) for _ in range(2))
    for p in policy.parameters():
        p.data = torch.randn_like(p) * 0.02 if p.dim() > 1 else torch.ones_like(p)
    reference.load_state_dict(policy.state_dict())
    prefix = torch.randint(V, (B, s.P), device=DEVICE)
    pad = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
        yield from sampling(s, policy, prefix, pad)
        yield from learning(s, policy, reference, prefix, pad)


@torch.no_grad()
def sampling(s: Sizes, policy, prefix, pad):
    how = dict(eos=-1, seed=0, index=torch.arange(len(prefix)))
    draw = functools.partial(sample_rollouts, policy, prefix, pad, s.K, s.N, **how)
    held = peak_gb(draw)  # and compiles
    took, drawn = once(draw)
    some = slice(0, 2)
    again = policy.logprobs(prefix[some], pad[some], drawn.tokens[some])
    apart = (again - drawn.logprobs[some]).abs()
    yield dict(
        what=f"{s.K} rollouts of {len(prefix)} prefixes", seconds=took,
        tokens_per_second=drawn.tokens.numel() / took, **held,
        logprob_differs_at_most=apart.max().item(), logprob_differs_on_average=apart.mean().item(),
    )  # fmt: skip
    cached = PrefixCache(policy, prefix, pad, s.K, s.N)
    cached.step(prefix[:, : s.K])
    if cached.replay:
        yield dict(what="a decoding step, CUDA graph", milliseconds=seconds(cached.replay) * 1e3)
    yield dict(what="a decoding step, eager", milliseconds=seconds(cached.compute) * 1e3)


def learning(s: Sizes, policy, reference, prefix, pad):
    config = Config(
        batch_size=len(prefix), candidates="rollouts", rollouts=s.K, chunk=s.N, max_seq=s.P + s.N,
        micro_batch_tokens=8192 if CUDA else 512, gpus=1, baseline=False,
    )  # fmt: skip
    optimizer = make_optimizer(policy, config)
    pairs = torch.randint(policy.config.vocab_size, (len(prefix), 2, s.N), device=DEVICE)
    rows = max(1, config.micro_batch_tokens // (s.P + 2 * s.N))

    def learn():
        for part in torch.arange(len(prefix)).split(rows):
            given = prefix[part], pad[part], pairs[part]
            with torch.no_grad():
                anchor = reference.logprobs(*given).sum(dim=2)
            logp = policy.logprobs(*given).sum(dim=2)
            (dpo_loss(logp, anchor, 0.1).sum() / len(prefix)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    learn()  # compiles, and makes the optimiser's moments
    held = peak_gb(learn)
    if held:  # the forecast adds up what sampling and learning hold in turn
        forecast = sum(memory(config, policy.config, bf16=True).values()) / 1e9
        held |= {"forecast_gb": forecast, "forecast_over_peak": forecast / held["peak_gb"]}
    yield dict(what=f"update on {len(prefix)} pairs", seconds=once(learn)[0], **held)
    policy.compiled = CUDA
    learn()
    yield dict(what="the same, compile=True", seconds=once(learn)[0])


# ---- The order ---------------------------------------------------------------------------------


def rows(minutes: float = 8.0, sizes: Sizes | None = None) -> Iterator[dict]:
    """One dict a measurement, ours first in each section, what matters most first."""
    s, began = sizes or (Sizes() if CUDA else SMALL), time.monotonic()
    path = "Triton" if kernels.use_triton(torch.empty(0, device=DEVICE, dtype=DTYPE)) else "PyTorch"
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    yield dict(what=f"{machine}, torch {torch.__version__}, ours = {path}") | {
        unit: value / {"TFLOP/s": 1e12, "GB/s": 1e9}[unit] for unit, value in ceilings().items()
    }
    work = [
        functools.partial(attention, s, 2),
        functools.partial(logprob, s, s.vocabularies[0]),
        functools.partial(decoding, s),
        functools.partial(policy_step, s, s.vocabularies[0], 16 if CUDA else 2),
        functools.partial(attention, s, s.K),
        functools.partial(logprob, s, s.vocabularies[-1]),
        functools.partial(attention, replace(s, Hkv=s.H // 2), 2),
    ]
    for n, section in enumerate(work):
        if time.monotonic() - began > 60 * minutes:
            yield dict(
                what=f"{len(work) - n} of {len(work)} sections left out: the minutes are over"
            )
            return
        yield from section()
        if CUDA:
            torch.cuda.empty_cache()
