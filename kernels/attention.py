"""Attention over one prefix and many continuations: training rows and two-part decoding.

A row is laid out [left-padded prefix | continuation 1 | ... | continuation C].  Which keys (across)
a query (down) sees follows from three numbers, P, N and the row's padding, so no mask is stored:

                 prefix P = 6        C = 2 continuations, N = 3
            .  .  k2 k3 k4 k5 | a0 a1 a2 | b0 b1 b2
        q2  .  .  x                                     pad = 2: two columns of padding
        q3  .  .  x  x                                  prefix: causal from the padding on
        q4  .  .  x  x  x
        q5  .  .  x  x  x  x
        a0  .  .  x  x  x  x    x                       a continuation: the whole prefix ...
        a1  .  .  x  x  x  x    x  x
        a2  .  .  x  x  x  x    x  x  x
        b0  .  .  x  x  x  x              x             ... and its own tokens, causally
        b1  .  .  x  x  x  x              x  x
        b2  .  .  x  x  x  x              x  x  x

The kernels are FlashAttention-2 (Dao 2023): softmax online over blocks of keys, of which only the
log-sum-exp is kept; probabilities are computed again backward.  What is new is which blocks they
visit.  A tile of queries goes through the whole blocks of prefix keys, from the first real one on,
without a mask, then through the few blocks at its edges with one: the end of the prefix, a jump
over the continuations in between, its own keys (always masked: at N = 128 each of their blocks is
an edge).  Decoding splits attention at the end of the prefix (Hydragen, Juravsky et al. 2024): one
tile holds the queries of all K rollouts times the heads of a group, so the prefix is read once.

Tiles are as large as the registers allow without a spill: accumulators of 128 x 128 take 64 of the
255 of each of 8 warps; those of sm_90 at D = 128 were the fastest of some twenty on an H200.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels import architecture, chosen, cores, jit, tl

# target, kernel, head dimension: (BM, BN, warps, stages); BM queries (when decoding: rows), BN keys
_DECODE = {
    "decode_prefix": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
    "decode_own": {64: (16, 64, 4, 2), 128: (16, 64, 4, 2)},
}
CONFIGS = {
    "sm_80": _DECODE | {
        "forward": {64: (128, 64, 8, 2), 128: (128, 32, 8, 3)},
        "backward_query": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
        "backward_key": {64: (32, 128, 8, 2), 128: (16, 128, 8, 2)},
    },
    "sm_90": _DECODE | {
        "forward": {64: (128, 64, 4, 3), 128: (64, 64, 4, 3)},
        "backward_query": {64: (128, 64, 8, 2), 128: (128, 64, 8, 3)},
        "backward_key": {64: (64, 128, 8, 2), 128: (32, 64, 4, 3)},
    },
    "sm_100": _DECODE | {
        "forward": {64: (128, 64, 4, 3), 128: (128, 128, 8, 2)},
        "backward_query": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
        "backward_key": {64: (64, 128, 8, 2), 128: (64, 64, 4, 2)},
    },
    "gfx942": {
        "forward": {64: (128, 64, 4, 1), 128: (128, 32, 4, 1)},
        "backward_query": {64: (128, 64, 4, 1), 128: (128, 32, 4, 1)},
        "backward_key": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1)},
        "decode_prefix": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1)},
        "decode_own": {64: (16, 64, 4, 1), 128: (16, 64, 4, 1)},
    },
}  # fmt: skip
LOG2E = 1.4426950408889634
KEPT = 1 << 20  # weights of several continuations' attention, from which on they are not kept


def prefix_attention(q, k, v, pad, prefix: int, length: int):
    """Attention over rows laid out [left-padded prefix | continuation 1 | ... | continuation C].

    q [B, H, T, D], k and v [B, Hkv, T, D] in any strides, T = prefix + C * length; pad int32 [B]
    counts the padding tokens at the left of each prefix.  Returns [B, H, T, D], 0 at padding.
    """
    heads = q.shape[1] // k.shape[1], q.shape[3]
    attend = chosen(_prefix_kernel, prefix_attention_torch, _prefix_example, q, *heads)
    return attend(q, k, v, pad, prefix, length)


def decode_attention(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    """Attention of one new token per rollout over a shared prefix and its own continuation.

    q [B, K, H, D]; k_prefix, v_prefix [B, Hkv, P, D]; pad int32 [B]; k_cont, v_cont
    [B, K, Hkv, N, D], of which the first `filled` positions (int, or int32 [1] on the device)
    are valid and include the new token's own.  Returns [B, K, H, D]; has no gradient.  On a GPU
    nothing here waits for the device, so that a CUDA graph can hold it.
    """
    heads = q.shape[2] // k_prefix.shape[1], q.shape[3]
    attend = chosen(_decode_kernel, decode_attention_torch, _decode_example, q, *heads)
    return attend(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled)


def _prefix_kernel(q, k, v, pad, prefix: int, length: int):
    D = q.shape[-1]
    q, k, v = (_pad_heads(x) for x in (q, k, v))
    return _PrefixAttention.apply(q, k, v, pad, prefix, length, D**-0.5)[..., :D]


def _decode_kernel(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    D = q.shape[-1]
    q, *caches = (_pad_heads(x) for x in (q, k_prefix, v_prefix, k_cont, v_cont))
    if not isinstance(filled, torch.Tensor):
        filled = torch.full((1,), filled, dtype=torch.int32, device=q.device)
    return _decode(q, *caches[:2], pad, *caches[2:], filled, D**-0.5)[..., :D]


def _pad_heads(x):
    """Head dimensions to the kernels' 64 or 128, and unit stride along them."""
    D = x.shape[-1]
    if D > 128:
        raise ValueError(f"head dimension {D}: the kernels take at most 128")
    x = F.pad(x, (0, (64 if D <= 64 else 128) - D)) if D not in (64, 128) else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _prefix_example(draw, G: int, D: int):
    """Two rows, one of them padded, that meet every kind of block."""
    rows = lambda heads: draw(2, 440, heads, D).transpose(1, 2).requires_grad_()  # noqa: E731
    q, k, v = rows(2 * G), rows(2), rows(2)
    return q, k, v, torch.tensor([0, 37], dtype=torch.int32, device=q.device), 300, 70


def _decode_example(draw, G: int, D: int):
    """Three rollouts of two prefixes, their caches half full."""
    prefix, own = [draw(2, 2, 300, D) for _ in "kv"], [draw(2, 3, 2, 70, D) for _ in "kv"]
    pad = torch.tensor([0, 37], dtype=torch.int32, device=own[0].device)
    return draw(2, 3, 2 * G, D), *prefix, pad, *own, torch.full_like(pad[:1], 35)


# ---- PyTorch -----------------------------------------------------------------------------------


def prefix_attention_torch(q, k, v, pad, prefix: int, length: int):
    """The definition.  Padding is cut off first, so that it needs no mask and costs nothing: rows
    with equally much are computed together."""
    if not pad.any():
        return unpadded_attention(q, k, v, prefix, length)
    found, order = [], []
    for p in pad.unique().tolist():
        rows = (pad == p).nonzero()[:, 0]
        qr, kr, vr = (x[:, :, p:].index_select(0, rows) for x in (q, k, v))
        found.append(F.pad(unpadded_attention(qr, kr, vr, prefix - p, length), (0, 0, p, 0)))
        order.append(rows)
    return torch.cat(found)[torch.cat(order).argsort()]


def unpadded_attention(q, k, v, P: int, N: int):
    B, H, T, D = q.shape
    G = H // k.shape[1]
    if T - P <= N:  # at most one continuation: ordinary causal attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G > 1)
    out = unpadded_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], P, 0)
    qc = (q[:, :, P:] * D**-0.5).reshape(B, H // G, G, -1, N, D)  # [B, Hkv, G, C, N, D]
    kc, vc = (x[:, :, P:].reshape(B, H // G, 1, -1, N, D) for x in (k, v))
    inputs = qc, kc, vc, k[:, :, :P], v[:, :, :P]
    if torch.is_grad_enabled() and B * H * (T - P) * P >= KEPT:
        cont = checkpoint(continuations, *inputs, use_reentrant=False)
    else:
        cont = continuations(*inputs)
    return torch.cat([out, cont.reshape(B, H, T - P, D)], 2)


def continuations(q, k, v, k_prefix, v_prefix):
    """q [B, Hkv, G, C, N, D], scaled, on own k, v [B, Hkv, 1, C, N, D] and [B, Hkv, P, D]."""
    N, P = q.shape[4], k_prefix.shape[2]
    shared = q.flatten(2, 4) @ k_prefix.mT  # [B, Hkv, G*C*N, P]
    own = (q @ k.mT).add_(q.new_full((N, N), -torch.inf).triu(1))  # [B, Hkv, G, C, N, N]
    weights = torch.cat([shared.view(*own.shape[:-1], P), own], -1).softmax(-1)
    # The last product needs no second time where the others are computed again backward.
    attended = weights[..., P:] @ v
    return (weights[..., :P].flatten(2, 4) @ v_prefix).view(q.shape) + attended


def decode_attention_torch(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    """The definition: the K*G queries of a kv head attend to the prefix together, to their own keys
    apart, and each result counts by the sum of exponentials behind it."""
    B, K, H, D = q.shape
    Hkv, P = k_prefix.shape[1:3]
    G, on_cpu = H // Hkv, q.device.type == "cpu"
    query = q.unflatten(2, (Hkv, G))  # [B, K, Hkv, G, D]
    # A CPU leaves out what need not be masked; elsewhere asking that would wait for the device.
    N = int(filled) if on_cpu else k_cont.shape[3]
    empty = None if on_cpu else masked(torch.arange(N, device=q.device) >= filled, q.dtype)
    k_own, v_own = (x[..., :N, :].flatten(0, 1) for x in (k_cont, v_cont))
    own, own_lse = softmax_attention(query.flatten(0, 1), k_own, v_own, empty)
    if not P:
        return own.view(q.shape)
    mask = None
    if not on_cpu or pad.any():
        mask = masked(torch.arange(P, device=q.device) < pad.view(B, 1, 1, 1), q.dtype)
    folded = query.transpose(1, 2).reshape(B, Hkv, K * G, D)
    shared, lse = softmax_attention(folded, k_prefix, v_prefix, mask)
    share = own_lse.view(B, K, Hkv, G) - lse.view(B, Hkv, K, G).transpose(1, 2)
    shared = shared.unflatten(2, (K, G)).transpose(1, 2)  # [B, K, Hkv, G, D]
    own = own.unflatten(0, (B, K))
    return torch.lerp(shared, own, share.sigmoid_().unsqueeze(-1).to(q.dtype)).flatten(2, 3)


def masked(where, dtype):
    """Added to scores; finite, so that a prefix of padding alone makes no nan."""
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, torch.finfo(dtype).min)


def softmax_attention(q, k, v, mask=None):
    """q [B, H, M, D] on k, v [B, H, T, D] -> [B, H, M, D], and the log-sum-exp [B, H, M]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(exact)).to(q.dtype), lse


# ---- Triton ------------------------------------------------------------------------------------


@jit
def _in_turn(tiles):
    """This program's tile, the longest being first, and its row of the batch times heads.  Eight
    rows take turns: all processors finish together, and the keys of eight fit into an L2 cache."""
    first = tl.program_id(0) // (8 * tiles) * 8
    n = tl.program_id(0) - first * tiles
    width = tl.minimum(tl.num_programs(0) // tiles - first, 8)
    return n // width, first + n % width


@jit
def _query_tile(Pad, H, T, P, N, BM: tl.constexpr, BN: tl.constexpr):
    """This program's row b, head h and queries from `start` to `end`, and the keys that they need:
    `full` blocks from `pad` on that all of them see whole, then `masked` blocks, of which `near`
    follow directly and the others after `jump` keys of other continuations."""
    prefix_tiles = tl.cdiv(P, BM)
    tiles = prefix_tiles + tl.cdiv(T - P, BM)
    turn, line = _in_turn(tiles)
    tile = tiles - 1 - turn  # the last queries see most
    b, h = (line // H).to(tl.int64), line % H
    pad = tl.load(Pad + b)
    is_prefix = tile < prefix_tiles
    start = tl.where(is_prefix, tile * BM, P + (tile - prefix_tiles) * BM)
    end = tl.where(is_prefix, P, T)
    stop = tl.minimum(start + BM, end)  # last key + 1 that a row of the tile may see
    own = tl.where(is_prefix, 0, P + (start - P) // N * N)  # its first continuation
    full = tl.maximum(tl.where(is_prefix, start + 1, P) - pad, 0) // BN
    edge = pad + full * BN
    near = tl.cdiv(tl.maximum(tl.minimum(stop, P) - edge, 0), BN)
    jump = tl.maximum(own - (edge + near * BN), 0)
    far = tl.cdiv(tl.maximum(stop - (edge + near * BN + jump), 0), BN)
    return b, h, pad, start, end, full, near, tl.where(is_prefix, near, near + far), jump


@jit
def _softmax_step(acc, total, top, q, k_at, v_at, live, seen, scale, MASKED: tl.constexpr):
    """One block of keys in the online softmax, in base 2: scale includes log2(e)."""
    if MASKED:
        s = tl.where(seen, tl.dot(q, tl.load(k_at, mask=live[None, :], other=0.0)), -1e30)
    else:
        s = tl.dot(q, tl.load(k_at))  # [BM, BN]
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])  # [BM, BN]
    fade = tl.exp2(top - new)  # what came before, relative to the new largest score: [BM]
    total = total * fade + tl.sum(p, 1)
    v = tl.load(v_at, mask=live[:, None], other=0.0) if MASKED else tl.load(v_at)  # [BN, D]
    return tl.dot(p.to(v.dtype), v, acc * fade[:, None]), total, new


@jit
def _forward(
    Q, K, V, Out, Lse, Pad, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, G, T, P, N, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # 1. A program's tile of BM queries, and the keys that these see.
    b, h, pad, start, end, full, near, masked, jump = _query_tile(Pad, H, T, P, N, BM, BN)
    # Rows past the end repeat the last one, and store it again: cheaper than a mask.
    i, d = tl.minimum(start + tl.arange(0, BM), end - 1), tl.arange(0, D)
    q = tl.load(Q + b * qb + h * qh + i[:, None] * qt + d[None, :])  # [BM, D]
    column = tl.arange(0, BN)
    k_in = column[None, :] * kt + d[:, None]  # [D, BN], transposed
    v_in = column[:, None] * vt + d[None, :]  # [BN, D]
    K += b * kb + h // G * kh + pad * kt
    V += b * vb + h // G * vh + pad * vt
    acc = tl.zeros([BM, D], tl.float32)
    total, top = tl.zeros([BM], tl.float32), tl.full([BM], -1e30, tl.float32)
    # 2. The blocks of prefix keys that every row of the tile sees whole.
    for _ in range(full):
        acc, total, top = _softmax_step(acc, total, top, q, K + k_in, V + v_in, 0, 0, scale, False)
        K += BN * kt
        V += BN * vt
    # 3. The blocks at the edges: the end of the prefix, and after a jump the tile's own keys.
    own = P + (i - P) // N * N  # where the continuation of a query starts
    ahead = tl.where(near > 0, 0, jump)
    first = pad + full * BN + ahead
    k_at, v_at = K + ahead * kt + k_in, V + ahead * vt + v_in
    for t in range(masked):
        j = first + column
        seen = (j[None, :] <= i[:, None]) & ((j[None, :] < P) | (j[None, :] >= own[:, None]))
        acc, total, top = _softmax_step(acc, total, top, q, k_at, v_at, j < T, seen, scale, True)
        ahead = BN + tl.where(t + 1 == near, jump, 0)
        first += ahead
        k_at += ahead * kt
        v_at += ahead * vt
    # 4. Divided by the sum; padding gets 0, and a log-sum-exp that makes exp2(s - lse) 0 backward.
    real = i >= pad
    out = acc / tl.where(real, total, 1.0)[:, None]
    out = tl.where(real[:, None], out, 0.0)
    o_at = Out + b * ob + h * oh + i[:, None] * ot + d[None, :]
    tl.store(o_at, out.to(Out.dtype.element_ty))
    lse = tl.where(real, top + tl.log2(tl.where(real, total, 1.0)), 1e30)
    tl.store(Lse + (b * H + h) * T + i, lse)


@jit
def _query_step(dq, q, do, k_at, v_at, lse, delta, live, seen, scale, MASKED: tl.constexpr):
    """One block of keys in dQ: p again from s and the log-sum-exp, ds = p * (dp - delta)."""
    k = tl.load(k_at, mask=live[:, None], other=0.0) if MASKED else tl.load(k_at)  # [BN, D]
    v = tl.load(v_at, mask=live[:, None], other=0.0) if MASKED else tl.load(v_at)
    p = tl.exp2(tl.dot(q, k.T) * scale - lse[:, None])  # [BM, BN]
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(do, v.T) - delta[:, None])  # [BM, BN]
    return tl.dot(ds.to(k.dtype), k, dq)


@jit
def _backward_query(
    Q, K, V, Out, DOut, Lse, Delta, DQ, Pad, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    gb, gh, gt, H, G, T, P, N, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # 1. The same tile of queries as forward, with its output's gradient and log-sum-exp.
    b, h, pad, start, end, full, near, masked, jump = _query_tile(Pad, H, T, P, N, BM, BN)
    i, d = start + tl.arange(0, BM), tl.arange(0, D)
    inside = i[:, None] < end
    row = (b * H + h) * T + i
    q = tl.load(Q + b * qb + h * qh + i[:, None] * qt + d[None, :], mask=inside, other=0.0)
    do = tl.load(DOut + b * gb + h * gh + i[:, None] * gt + d[None, :], mask=inside, other=0.0)
    out = tl.load(Out + b * ob + h * oh + i[:, None] * ot + d[None, :], mask=inside, other=0.0)
    lse = tl.load(Lse + row, mask=i < end, other=1e30)
    # 2. delta, the sum of p * dp over the keys, is that of out * dout; _backward_key reads it.
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
    tl.store(Delta + row, delta, mask=i < end)
    # 3. The blocks of keys that forward visited.
    column = tl.arange(0, BN)
    k_in, v_in = column[:, None] * kt + d[None, :], column[:, None] * vt + d[None, :]
    K += b * kb + h // G * kh
    V += b * vb + h // G * vh
    own = P + (i - P) // N * N
    dq = tl.zeros([BM, D], tl.float32)
    for t in range(full):
        k_at, v_at = K + (pad + t * BN) * kt + k_in, V + (pad + t * BN) * vt + v_in
        dq = _query_step(dq, q, do, k_at, v_at, lse, delta, 0, 0, scale, False)
    for t in range(masked):
        first = pad + (full + t) * BN + tl.where(t < near, 0, jump)
        k_at, v_at, j = K + first * kt + k_in, V + first * vt + v_in, first + column
        seen = (j[None, :] <= i[:, None]) & ((j[None, :] < P) | (j[None, :] >= own[:, None]))
        dq = _query_step(dq, q, do, k_at, v_at, lse, delta, j < T, seen, scale, True)
    dq = dq * (scale * 0.6931471805599453)  # ln 2: back from base 2
    dq_at = DQ + b * ob + h * oh + i[:, None] * ot + d[None, :]
    tl.store(dq_at, dq.to(DQ.dtype.element_ty), mask=inside)


@jit
def _key_step(dk, dv, k, v, q_at, g_at, l_at, m_at, live, seen, scale, MASKED: tl.constexpr):
    """One block of queries in dK and dV, scores transposed so that p is an operand as it stands."""
    q = tl.load(q_at, mask=live[:, None], other=0.0) if MASKED else tl.load(q_at)  # [BM, D]
    lse = tl.load(l_at, mask=live, other=1e30) if MASKED else tl.load(l_at)
    do = tl.load(g_at, mask=live[:, None], other=0.0) if MASKED else tl.load(g_at)
    delta = tl.load(m_at, mask=live, other=0.0) if MASKED else tl.load(m_at)
    p = tl.exp2(tl.dot(k, q.T) * scale - lse[None, :])  # [BN, BM]
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv)  # [BN, D]
    ds = p * (tl.dot(v, do.T) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@jit
def _backward_key(
    Q, K, V, DOut, Lse, Delta, DK, DV, Pad, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt,
    db, dh, dt, H, G, T, P, N, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # 1. A program's tile of BN keys of one kv head.
    prefix_tiles = tl.cdiv(P, BN)
    tiles, heads = prefix_tiles + tl.cdiv(T - P, BN), H // G
    tile, line = _in_turn(tiles)  # the first keys are seen by most
    b, kv = (line // heads).to(tl.int64), line % heads
    pad = tl.load(Pad + b)
    is_prefix = tile < prefix_tiles
    start = tl.where(is_prefix, tile * BN, P + (tile - prefix_tiles) * BN)
    end = tl.where(is_prefix, P, T)
    # 2. Its queries: `near` masked blocks from `start`, `full` whole ones, `far` masked ones.
    # Prefix keys are seen by every query from `start` on, own keys up to their continuation's end.
    last = P + ((tl.minimum(start + BN, T) - 1 - P) // N + 1) * N
    stop = tl.where(is_prefix, tl.where(start + BN <= pad, start, T), last)
    near = tl.cdiv(tl.where(is_prefix, tl.minimum(BN, stop - start), stop - start), BM)
    full = tl.maximum(stop - (start + near * BM), 0) // BM
    far = tl.cdiv(tl.maximum(stop - (start + (near + full) * BM), 0), BM)
    j, d = start + tl.arange(0, BN), tl.arange(0, D)
    inside = j[:, None] < end
    k = tl.load(K + b * kb + kv * kh + j[:, None] * kt + d[None, :], mask=inside, other=0.0)
    v = tl.load(V + b * vb + kv * vh + j[:, None] * vt + d[None, :], mask=inside, other=0.0)
    until = tl.where(is_prefix, T, P + ((j - P) // N + 1) * N)  # end of a key's continuation
    dk, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    row = tl.arange(0, BM)
    q_in, g_in = row[:, None] * qt + d[None, :], row[:, None] * gt + d[None, :]
    Q += b * qb + kv * G * qh
    DOut += b * gb + kv * G * gh
    Lse += (b * H + kv * G) * T
    Delta += (b * H + kv * G) * T
    # 3. One flat loop over the blocks of all G heads: nested loops spilled on every architecture.
    for t in range(G * full):
        g, i = t // full, start + (near + t % full) * BM
        q_at, g_at, at = Q + g * qh + i * qt + q_in, DOut + g * gh + i * gt + g_in, g * T + i + row
        dk, dv = _key_step(dk, dv, k, v, q_at, g_at, Lse + at, Delta + at, 0, 0, scale, False)
    for t in range(G * (near + far)):
        g, n = t // (near + far), t % (near + far)
        i = start + (n + tl.where(n < near, 0, full)) * BM
        q_at, g_at, at = Q + g * qh + i * qt + q_in, DOut + g * gh + i * gt + g_in, g * T + i + row
        i += row
        seen = (i[None, :] >= j[:, None]) & (i[None, :] < until[:, None])
        dk, dv = _key_step(dk, dv, k, v, q_at, g_at, Lse + at, Delta + at, i < T, seen, scale, True)
    # 4. Padding gets 0.
    real = j[:, None] >= pad
    at = b * db + kv * dh + j[:, None] * dt + d[None, :]
    dk = tl.where(real, dk * (scale * 0.6931471805599453), 0.0)
    tl.store(DK + at, dk.to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, tl.where(real, dv, 0.0).to(DV.dtype.element_ty), mask=inside)


@jit
def _decode_prefix(
    Q, K, V, Part, PartLse, Pad, qb, qr, qh, kb, kh, kt, vb, vh, vt, HKV, G, R, P, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # 1. The keys of one split of a prefix, and BM of the R = K * G rows that all attend to them.
    b, kv = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    split, splits = tl.program_id(2), tl.num_programs(2)
    pad = tl.load(Pad + b)
    size = tl.cdiv(tl.cdiv(P - pad, splits), BN) * BN  # keys of one split
    start = pad + split * size
    stop = tl.minimum(start + size, P)
    full = tl.maximum(stop - start, 0) // BN
    r = tl.program_id(1) * BM + tl.arange(0, BM)  # of K * G rows: rollout r // G, its head r % G
    column, d = tl.arange(0, BN), tl.arange(0, D)
    k_in, v_in = column[None, :] * kt + d[:, None], column[:, None] * vt + d[None, :]
    K += b * kb + kv * kh
    V += b * vb + kv * vh
    q_at = Q + b * qb + (r // G)[:, None] * qr + (kv * G + r % G)[:, None] * qh + d[None, :]
    q = tl.load(q_at, mask=r[:, None] < R, other=0.0)  # [BM, D]
    # 2. Whole blocks, then the last one.
    acc = tl.zeros([BM, D], tl.float32)
    total, top = tl.zeros([BM], tl.float32), tl.full([BM], -1e30, tl.float32)
    for t in range(full):
        k_at, v_at = K + (start + t * BN) * kt + k_in, V + (start + t * BN) * vt + v_in
        acc, total, top = _softmax_step(acc, total, top, q, k_at, v_at, 0, 0, scale, False)
    for first in range(start + full * BN, stop, BN):
        k_at, v_at, live = K + first * kt + k_in, V + first * vt + v_in, first + column < stop
        seen = live[None, :]
        acc, total, top = _softmax_step(acc, total, top, q, k_at, v_at, live, seen, scale, True)
    # 3. An empty split has log-sum-exp -1e30: no weight.
    total = tl.where(start < stop, total, 1.0)
    at = (tl.program_id(0).to(tl.int64) * splits + split) * R + r
    tl.store(Part + at[:, None] * D + d[None, :], acc / total[:, None], mask=r[:, None] < R)
    tl.store(PartLse + at, top + tl.log2(total), mask=r < R)


@jit
def _decode_own(
    Q, K, V, Part, PartLse, Filled, Out, qb, qr, qh, kb, kr, kh, kt, vb, vr, vh, vt,
    HKV, G, splits, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # 1. BM query heads of one rollout and kv head.
    b, kv = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    rollout, rollouts = tl.program_id(1), tl.num_programs(1)
    filled = tl.load(Filled)  # from device memory: a CUDA graph replays as the cache grows
    g, column, d = tl.program_id(2) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    inside = g < G
    acc = tl.zeros([BM, D], tl.float32)
    total, top = tl.zeros([BM], tl.float32), tl.full([BM], -1e30, tl.float32)
    # 2. Go on from where the splits of the prefix left the softmax.
    for split in range(splits):
        at = ((tl.program_id(0).to(tl.int64) * splits + split) * rollouts + rollout) * G + g
        lse = tl.load(PartLse + at, mask=inside, other=-1e30)
        part = tl.load(Part + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        new = tl.maximum(top, lse)
        fade, weight = tl.exp2(top - new), tl.exp2(lse - new)
        acc = acc * fade[:, None] + part * weight[:, None]
        total, top = total * fade + weight, new
    # 3. The rollout's own keys, as many as are filled.
    q_at = b * qb + rollout * qr + (kv * G + g)[:, None] * qh + d[None, :]
    q = tl.load(Q + q_at, mask=inside[:, None], other=0.0)  # [BM, D]
    K += b * kb + rollout.to(tl.int64) * kr + kv * kh
    V += b * vb + rollout.to(tl.int64) * vr + kv * vh
    for first in range(0, filled, BN):
        j = first + column
        k_at, v_at = K + j[None, :] * kt + d[:, None], V + j[:, None] * vt + d[None, :]
        live = j < filled
        seen = live[None, :]
        acc, total, top = _softmax_step(acc, total, top, q, k_at, v_at, live, seen, scale, True)
    at = ((b * rollouts + rollout) * HKV + kv) * G + g
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + at[:, None] * D + d[None, :], out, mask=inside[:, None])


# ---- Launching ---------------------------------------------------------------------------------


def _config(kernel, D):
    BM, BN, warps, stages = CONFIGS[architecture()][kernel][D]
    return dict(D=D, BM=BM, BN=BN, num_warps=warps, num_stages=stages)


def _tiles(P, T, block):
    """Tiles of a row: none holds both prefix and continuations."""
    return -(-P // block) + -(-(T - P) // block)


def _token_major(x):
    """Empty like x [B, H, T, D], laid out [B, T, H, D] as the model's projections are."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pad, *sizes):
        out, lse = _attention(q, k, v, pad, *sizes)
        ctx.save_for_backward(q, k, v, out, lse, pad)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


def _attention(q, k, v, pad, prefix: int, length: int, scale: float):
    """(out [B, H, T, D], log-sum-exp in base 2 float32 [B, H, T])."""
    B, H, T, D = q.shape
    out, lse = _token_major(q), q.new_empty(B, H, T, dtype=torch.float32)
    config = _config("forward", D)
    _forward[(_tiles(prefix, T, config["BM"]) * B * H,)](
        q, k, v, out, lse, pad, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], H, H // k.shape[1], T, prefix, max(length, 1), scale * LOG2E, **config,
    )  # fmt: skip
    return out, lse


def _attention_backward(grad, q, k, v, out, lse, pad, prefix: int, length: int, scale: float):
    """Gradients of q, k and v; grad [B, H, T, D] is that of out."""
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv, delta = _token_major(q), _token_major(k), _token_major(k), torch.empty_like(lse)
    inputs = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    sizes = [H, H // Hkv, T, prefix, max(length, 1), scale * LOG2E]
    config = _config("backward_query", D)  # 1. dQ and delta: a program a tile of queries
    _backward_query[(_tiles(prefix, T, config["BM"]) * B * H,)](
        q, k, v, out, grad, lse, delta, dq, pad, *inputs, *out.stride()[:3], *grad.stride()[:3],
        *sizes, **config,
    )  # fmt: skip
    config = _config("backward_key", D)  # 2. dK and dV: a program a tile of keys, all G heads
    _backward_key[(_tiles(prefix, T, config["BN"]) * B * Hkv,)](
        q, k, v, grad, lse, delta, dk, dv, pad, *inputs, *grad.stride()[:3], *dk.stride()[:3],
        *sizes, **config,
    )  # fmt: skip
    return dq, dk, dv


def _decode(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled, scale: float):
    (B, K, H, D), (Hkv, P) = q.shape, k_prefix.shape[1:3]
    R = K * (H // Hkv)  # rows that share a kv head's prefix
    config = _config("decode_prefix", D)  # 1. the prefix, for BM of the R rows and a split
    rows = -(-R // config["BM"])
    fill = 2 * cores(q) // max(B * Hkv * rows, 1)  # tiles for every processor
    splits = min(-(-P // config["BN"]), max(fill, 1))
    part = q.new_empty(B, Hkv, splits, R, D, dtype=torch.float32)
    lse = q.new_empty(B, Hkv, splits, R, dtype=torch.float32)
    if splits:
        _decode_prefix[B * Hkv, rows, splits](
            q, k_prefix, v_prefix, part, lse, pad, *q.stride()[:3], *k_prefix.stride()[:3],
            *v_prefix.stride()[:3], Hkv, H // Hkv, R, P, scale * LOG2E, **config,
        )  # fmt: skip
    out, config = q.new_empty(B, K, H, D), _config("decode_own", D)  # 2. on to the own keys
    _decode_own[B * Hkv, K, -(-H // Hkv // config["BM"])](
        q, k_cont, v_cont, part, lse, filled, out, *q.stride()[:3], *k_cont.stride()[:4],
        *v_cont.stride()[:4], Hkv, H // Hkv, splits, scale * LOG2E, **config,
    )  # fmt: skip
    return out
