"""Speed and memory of the kernels against what one would use instead, each checked in float64.

    python -m kernels.bench            # on a GPU: attention, decoding, log-probability
                                       # on a CPU: the PyTorch paths, chunked against materialised

`rows()` yields one dict a measurement, for bench.py.  Shares are of what this machine reaches in a
large matrix product and a large copy, measured first.  A peer that is not installed is left out.
"""

import functools
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from kernels import use_triton
from kernels.attention import (
    decode_attention,
    decode_attention_torch,
    prefix_attention,
    prefix_attention_torch,
)
from kernels.logprob import linear_logprob


@dataclass
class Sizes:
    """The paper's: 1.3B Llama (16 heads of 128), prefixes of 1,920, N = 128, K = 16."""

    B: int = 4
    H: int = 16
    Hkv: int = 8
    D: int = 128
    P: int = 1920
    N: int = 128
    K: int = 16
    tokens: int = 2048
    dim: int = 2048
    vocabulary: int = 128_256


CPU = Sizes(B=2, H=8, Hkv=8, D=64, P=512, N=64, K=16, tokens=512, dim=512)


def seconds(run, device):
    """Median on a GPU, best of three on a CPU (others use it too)."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1000
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def replayed(run):
    """`run` captured in a CUDA graph, as a sampler would: launches cost more than a decode step."""
    graph = torch.cuda.CUDAGraph()
    run()  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run, device):
    """Most memory held at once on top of what is held before; nan where it cannot be known."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0])  # noqa: E731
    peaks = []
    for _ in range(3):  # the allocator sometimes holds on to pages: the smallest is the need
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        except OSError:
            return float("nan")
        before = status("VmRSS:")
        run()
        peaks.append((status("VmHWM:") - before) * 1024)
    return min(peaks)


def ceilings(device, dtype):
    """(FLOP/s of a large matrix product, bytes/s of a large copy)."""
    n, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty(size, dtype=torch.uint8, device=device)
    product = 2 * n**3 / seconds(lambda: a @ a, device)
    return product, 2 * size / seconds(b.clone, device)


def worst(value, exact):
    return ((value.detach().double() - exact).abs().max() / exact.abs().max()).item()


def measure(section, peers, work, ceiling, unit, device, **extra):
    """One row a peer; `peers` maps names to functions, ours first; `work` in FLOP or bytes."""
    ours = None
    for name, run in peers.items():
        try:
            took = seconds(run, device)
        except Exception as e:  # a peer that this card or its version cannot run costs its row only
            if name == "ours":
                raise
            yield dict(section=section, peer=f"{name}: {type(e).__name__}")
            continue
        ours = ours or took
        rate = work / took / (1e12 if unit == "TFLOP/s" else 1e9)
        yield dict(
            section=section, peer=name, milliseconds=took * 1e3, speedup=took / ours, rate=rate,
            unit=unit, share=work / took / ceiling, **(extra if name == "ours" else {}),
        )  # fmt: skip


# ---- Attention over training rows --------------------------------------------------------------


def flex_attention(pad, P, N, T):
    """FlexAttention with the same mask, compiled: the general tool for this geometry."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        own = (i - P) // max(N, 1) == (j - P) // max(N, 1)
        return (j >= pad[b]) & (j <= i) & ((j < P) | own)

    mask = create_block_mask(visible, len(pad), None, T, T, device=pad.device)
    return functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)


def attention(s: Sizes, C, device, dtype, ceiling):
    T = s.P + C * s.N
    draw = lambda h: torch.randn(s.B, T, h, s.D, device=device, dtype=dtype).transpose(1, 2)  # noqa: E731
    q, k, v = (draw(h).requires_grad_() for h in (s.H, s.Hkv, s.Hkv))
    pad = torch.zeros(s.B, dtype=torch.int32, device=device)
    # The peers that know no shared prefix compute every continuation with its own copy of it.
    copies = max(C, 1)
    length = s.P + (s.N if C else 0)
    apart = lambda h: torch.randn(s.B * copies, length, h, s.D, device=device, dtype=dtype)  # noqa: E731
    qa, ka, va = (apart(h).transpose(1, 2).requires_grad_() for h in (s.H, s.Hkv, s.Hkv))

    ours = functools.partial(prefix_attention, pad=pad, prefix=s.P, length=s.N)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    peers = {"ours": (ours, (q, k, v)), "SDPA, rows apart": (sdpa, (qa, ka, va))}
    if device == "cuda":  # FlexAttention has no backward on a CPU
        peers["FlexAttention, same mask"] = flex_attention(pad, s.P, s.N, T), (q, k, v)
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        flash = functools.partial(flash_attn_func, causal=True)
        peers["flash-attn, rows apart"] = flash, [x.transpose(1, 2) for x in (qa, ka, va)]

    double = [x[:1].detach().double().requires_grad_() for x in (q, k, v)]
    exact = prefix_attention_torch(*double, pad[:1], s.P, s.N)
    out = ours(q, k, v)
    error = worst(out[:1], exact)
    pairs = s.P * (s.P + 1) // 2 + C * (s.N * s.P + s.N * (s.N + 1) // 2)
    flop = 4 * s.B * s.H * s.D * pairs  # what the geometry needs, whoever computes it
    runs = {peer: functools.partial(run, *inputs) for peer, (run, inputs) in peers.items()}
    with torch.no_grad():
        yield from measure(
            f"attention C={C} forward", runs, flop, ceiling, "TFLOP/s", device, error=error
        )

    def backward(run, inputs):
        @functools.cache
        def forward():  # in the first turn, which is not timed
            out = run(*inputs)
            return out, torch.randn_like(out)

        return lambda: torch.autograd.grad(forward()[0], inputs, forward()[1], retain_graph=True)

    upstream = torch.randn_like(out)
    exact = torch.autograd.grad(exact, double, upstream[:1].double())
    found = torch.autograd.grad(out, (q, k, v), upstream)
    error = max(worst(a[:1], b) for a, b in zip(found, exact, strict=True))
    runs = {peer: backward(run, inputs) for peer, (run, inputs) in peers.items()}
    yield from measure(
        f"attention C={C} backward", runs, flop * 5 // 2, ceiling, "TFLOP/s", device, error=error
    )


# ---- Decoding ----------------------------------------------------------------------------------


def decoding(s: Sizes, device, dtype, ceiling):
    draw = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    q = draw(s.B, s.K, s.H, s.D)
    prefix = [draw(s.B, s.Hkv, s.P, s.D) for _ in "kv"]
    cont = [draw(s.B, s.K, s.Hkv, s.N, s.D) for _ in "kv"]
    pad = torch.zeros(s.B, dtype=torch.int32, device=device)
    filled = torch.full((1,), s.N, dtype=torch.int32, device=device)
    full = [
        torch.cat([p[:, None].expand(-1, s.K, -1, -1, -1), c], 3).flatten(0, 1)
        for p, c in zip(prefix, cont, strict=True)
    ]  # [B*K, Hkv, P + N, D]: what a sampler without shared prefixes keeps
    query = q.flatten(0, 1)[:, :, None]
    peers = {
        "ours": lambda: decode_attention(q, *prefix, pad, *cont, filled),
        "SDPA, expanded caches": lambda: F.scaled_dot_product_attention(
            query, *full, enable_gqa=True
        ),
    }
    inputs = [x[:1].double() for x in (q, *prefix, *cont)]
    exact = decode_attention_torch(*inputs[:3], pad[:1], *inputs[3:], s.N)
    error = worst(peers["ours"]()[:1], exact)
    size = sum(x.numel() * x.element_size() for x in (*prefix, *cont))  # each cache read once
    if device == "cuda":
        peers = {name: replayed(run) for name, run in peers.items()}
    with torch.no_grad():
        yield from measure("decode", peers, size, ceiling, "GB/s", device, error=error)


# ---- Log-probability ---------------------------------------------------------------------------


def materialised(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1)


def logprob(s: Sizes, device, dtype, ceiling):
    hidden = torch.randn(s.tokens, s.dim, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(s.vocabulary, s.dim, device=device, dtype=dtype).mul_(s.dim**-0.5)
    weight.requires_grad_()
    targets = torch.randint(s.vocabulary, (s.tokens,), device=device)
    functions = {"ours": linear_logprob, "materialised": materialised}
    if device == "cuda":
        functions["materialised, torch.compile"] = torch.compile(materialised)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            functions["Liger, sum of them"] = lambda h, w, t: loss(w, h, t)

    def both(function):
        def run():
            value = function(hidden, weight, targets).sum()
            torch.autograd.grad(value, (hidden, weight))

        return run

    some = slice(0, 64)
    exact = materialised(hidden[some].double(), weight.double(), targets[some]).detach()
    error = worst(linear_logprob(hidden[some], weight, targets[some]), exact)
    flop = 6 * s.tokens * s.dim * s.vocabulary  # without what a chunked path computes again
    runs = {peer: both(function) for peer, function in functions.items()}
    gradients = (hidden.numel() + weight.numel()) * weight.element_size()  # every peer holds them
    for row in measure("logprob both ways", runs, flop, ceiling, "TFLOP/s", device, error=error):
        if row["peer"] in runs:
            row["peak_mb"] = (peak_bytes(runs[row["peer"]], device) - gradients) / 2**20
        yield row


# ---- The table ---------------------------------------------------------------------------------


def rows(device=None, sizes=None):
    """One dict a measurement, ours first in each section; a CPU runs the PyTorch definitions."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    s = sizes or (Sizes() if device == "cuda" else CPU)
    flops, bandwidth = ceilings(device, dtype)
    probe = torch.empty(0, device=device, dtype=dtype)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    path = "Triton" if use_triton(probe) else "PyTorch"
    yield dict(
        section="machine", peer=f"{machine}, ours = {path}", rate=flops / 1e12, unit="TFLOP/s"
    )
    yield dict(section="machine", peer="copy", rate=bandwidth / 1e9, unit="GB/s")
    for C in (0, 2, s.K):
        yield from attention(s, C, device, dtype, flops)
    yield from decoding(s, device, dtype, bandwidth)
    yield from logprob(s, device, dtype, flops)


def main():
    columns = ["section", "peer", "milliseconds", "speedup", "rate", "unit", "share", "peak_mb"]
    columns.append("error")
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows():
        cells = (row.get(c, "") for c in columns)
        cells = (f"{x:.3g}" if isinstance(x, float) else x for x in cells)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
