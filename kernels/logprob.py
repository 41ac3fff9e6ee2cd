"""Log-probabilities of target tokens straight from hidden states, never storing [T, V].

                    vocabulary V in tiles ->                    per token, running over the tiles:
                  +------+------+------+------+                   largest logit
        hidden    | W[v] |      |      |      |                   sum of exp(logit - largest)
        [T, d]    +------+------+------+------+                   logit of the target
        tile of   logits: one BT x BV tile at a
        tokens    time, in registers, then gone                 logp = logit - log-sum-exp

The forward pass is a matrix product with an online softmax in place of the store; S programs share
a tile of tokens, each for its part of the vocabulary, so that small batches fill a GPU too.  The
backward pass computes the logits again (Wijmans et al. 2024, "Cut your losses") and turns them into

    d logits = g_logp * (onehot - p) / temperature

for one slice of the vocabulary at a time: [T, slice] in a workspace, then two library products,
d hidden += d logits @ W[slice] and dW[slice] = d logits.T @ hidden.  No atomics, so a run repeats
bit for bit.  Precision: logits, softmax and every sum are float32; d logits are rounded once, to
bfloat16 if hidden is (as autograd would) and else kept in float32, because probabilities of a large
vocabulary underflow in float16; each row of dW is one sum over all tokens, d hidden adds its slices
in float32.  Dividing by the temperature here is what makes scoring agree with sampling.

Tiles of 128 x 128 x 64 with 8 warps are the largest that do not spill everywhere; forward on sm_90
128 x 256 does not either, and an H200 needs a fifth less time with it.
"""

import torch

from kernels import architecture, chosen, cores, jit, tl

SLICE = 1 << 20  # logits alive at once: 4 MiB in float32, small enough for a CPU's caches
WORKSPACE = 1 << 25  # d logits alive at once on a GPU: 64 MiB in bfloat16

# target, kernel: (BT tokens, BV vocabulary, BK hidden, warps, stages)
CONFIGS = {
    "sm_80": {"forward": (128, 128, 64, 8, 3), "backward": (128, 128, 64, 8, 3)},
    "sm_90": {"forward": (128, 256, 64, 8, 3), "backward": (128, 128, 64, 8, 3)},
    "sm_100": {"forward": (128, 128, 64, 8, 3), "backward": (128, 128, 64, 4, 3)},
    "gfx942": {"forward": (128, 128, 64, 8, 1), "backward": (128, 128, 64, 8, 1)},
}
LOG2E = 1.4426950408889634


def linear_logprob(hidden, weight, targets, temperature: float = 1.0):
    """log softmax(hidden @ weight.T / temperature)[targets], without the logits.

    hidden [T, d], weight [V, d], targets int64 [T] with -100 where ignored.  Returns float32 [T]
    (float64 for float64 input), 0 at ignored targets.
    """
    keep = (targets != -100).nonzero().squeeze(1)
    if len(keep) < len(targets):  # left out before any work
        kept = linear_logprob(hidden[keep], weight, targets[keep], temperature)
        return hidden.new_zeros(len(targets), dtype=kept.dtype).index_put((keep,), kept)
    V, d = weight.shape
    logprob = chosen(_logprob_kernel, _chunked, _example, hidden, d, min(V, 1024 + V % 16))
    return logprob(hidden, weight, targets, temperature)


def _logprob_kernel(hidden, weight, targets, temperature: float):
    if not len(targets):  # a grid without programs cannot be launched
        return _chunked(hidden, weight, targets, temperature)
    return _Fused.apply(hidden, weight.to(hidden.dtype), targets, temperature)


def _example(draw, d: int, V: int):
    """Tokens for two tiles, the second half empty; logits of variance 1."""
    hidden, weight = draw(200, d).requires_grad_(), (draw(V, d) * d**-0.5).requires_grad_()
    return hidden, weight, torch.arange(200, device=hidden.device) % V, 0.7


# ---- PyTorch -----------------------------------------------------------------------------------


def _chunked(hidden, weight, targets, temperature: float):
    """The definition."""
    with torch.autocast(hidden.device.type, enabled=False):  # float32 means float32
        return _Chunked.apply(hidden, weight, targets, temperature)


class _Chunked(torch.autograd.Function):
    """Walks over slices of the vocabulary, forward and again backward, in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
        pieces = slices(weight, len(h))
        logit = torch.zeros_like(h[:, 0])
        # Filled in place: small tensors kept from every turn would scatter the allocator's pages.
        lse = h.new_empty(len(pieces), len(h))
        for n, (first, w) in enumerate(pieces):
            z = h @ w.to(h.dtype).T  # [T, chunk]
            row, column = inside(targets, first, len(w))
            logit[row] = z[row, column]
            logp = z.log_softmax(1)  # one fused pass; any column tells the log-sum-exp
            torch.sub(z[:, 0], logp[:, 0], out=lse[n])
            del z, logp  # before the next ones are allocated
        lse = lse.logsumexp(0)  # [T]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        return logit - lse

    @staticmethod
    def backward(ctx, g_logp):
        hidden, weight, targets, lse = ctx.saved_tensors
        h = hidden.to(lse.dtype) / ctx.temperature
        dh, dw = torch.zeros_like(h), torch.empty_like(weight, dtype=h.dtype)
        scale = -g_logp[:, None]  # d logits = scale * (p - onehot)
        for first, w in slices(weight, len(h)):
            w = w.to(h.dtype)
            z = torch.addmm(-lse[:, None], h, w.T).exp_()  # p, [T, chunk]
            row, column = inside(targets, first, len(w))
            z[row, column] -= 1.0
            dh.addmm_(z, w)
            torch.mm(z.T, scale * h, out=dw[first : first + len(w)])
            del z
        dh = (dh * scale / ctx.temperature).to(hidden.dtype)
        return dh, dw.to(weight.dtype), None, None


def slices(weight, rows: int):
    """(first row, slice) of the vocabulary, as many rows a slice as SLICE logits allow."""
    size = max(SLICE // max(rows, 1), 128)
    return [(first, weight[first : first + size]) for first in range(0, len(weight), size)]


def inside(targets, first: int, size: int):
    """(positions, columns) of the targets that fall in the slice [first, first + size)."""
    row = ((targets >= first) & (targets < first + size)).nonzero().squeeze(1)
    return row, targets[row] - first


def linear_kl(hidden, weight, other, other_weight, scale, temperature: float = 1.0):
    """sum over t of scale[t] * KL(q || p) at token t, with gradients for p alone.

    p = softmax(hidden @ weight.T / temperature), q the same of other [T, d'] and other_weight
    [V, d']; hidden [T, d], weight [V, d], scale float [T].  Returns a float32 scalar.  A block of
    tokens at a time, in library products: few tokens are asked about (update.py's anchor).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _Divergence.apply(hidden, weight, other, other_weight, scale, temperature)


class _Divergence(torch.autograd.Function):
    """The value and, with the logits at hand, the gradients of its sum."""

    @staticmethod
    def forward(ctx, hidden, weight, other, other_weight, scale, temperature):
        total = scale.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        w, v = weight.to(hidden.dtype), other_weight.to(other.dtype)
        learns = ctx.needs_input_grad[0]
        dh, dw = (torch.zeros_like(x) for x in (hidden, weight)) if learns else (None, None)
        size = max((WORKSPACE if hidden.is_cuda else SLICE) // len(weight), 64)
        for first in range(0, len(hidden), size):
            h, o, s = (x[first : first + size] for x in (hidden, other, scale))
            logp, logq = (  # [size, V]
                (z.to(total.dtype) / temperature).log_softmax(1) for z in (h @ w.T, o @ v.T)
            )
            q = logq.exp()
            total += s @ (q * (logq - logp)).sum(1)
            if learns:
                dz = ((logp.exp() - q) * (s[:, None] / temperature)).to(h.dtype)  # d logits
                dh[first : first + size] = dz @ w
                dw += dz.T @ h
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx, g_total):
        dh, dw = ctx.saved_tensors
        return g_total * dh, g_total * dw, None, None, None, None


# ---- Triton ------------------------------------------------------------------------------------


@jit
def _logits(
    Hidden, Weight, t, v, T, V, dim, ht, wv,
    BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of hidden @ weight.T; rows past the end repeat the last one and are cut later."""
    t = tl.minimum(t, T - 1).to(tl.int64)
    v = tl.minimum(v, V - 1).to(tl.int64)
    d = tl.arange(0, BK)
    h_at = Hidden + t[:, None] * ht + d[None, :]  # [BT, BK]
    w_at = Weight + v[None, :] * wv + d[:, None]  # [BK, BV]
    z = tl.zeros([BT, BV], tl.float32)
    for first in range(0, dim, BK):
        if EVEN:
            z = tl.dot(tl.load(h_at), tl.load(w_at), z)
        else:
            h = tl.load(h_at, mask=first + d[None, :] < dim, other=0.0)
            z = tl.dot(h, tl.load(w_at, mask=first + d[:, None] < dim, other=0.0), z)
        h_at += BK
        w_at += BK
    return z


@jit
def _logprob_forward(
    Hidden, Weight, Targets, Lse, Logit, T, V, dim, ht, wv, tiles, scale,
    BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    target = tl.load(Targets + t, mask=t < T, other=-1)
    top, total = tl.full([BT], -1e30, tl.float32), tl.zeros([BT], tl.float32)
    logit = tl.zeros([BT], tl.float32)
    begin = tl.program_id(1) * tiles * BV  # this program's part of the vocabulary
    for first in range(begin, tl.minimum(begin + tiles * BV, V), BV):
        # 1. A tile of logits, in base 2, and the target's if it is among them.
        v = first + tl.arange(0, BV)
        z = _logits(Hidden, Weight, t, v, T, V, dim, ht, wv, BT, BV, BK, EVEN) * scale
        z = tl.where(v[None, :] < V, z, -1e30)  # [BT, BV]
        logit += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
        # 2. The online softmax.
        new = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
        top = new
    at = tl.program_id(1) * T + t
    tl.store(Lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=t < T)
    tl.store(Logit + at, logit * 0.6931471805599453, mask=t < T)


@jit
def _logprob_backward(
    Hidden, Weight, Targets, Lse, GLogp, DLogits, T, V, dim, ht, wv, begin, end, dt, scale,
    BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # 1. A tile of logits again, and its probabilities from the log-sum-exp.
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    v = begin + tl.program_id(1) * BV + tl.arange(0, BV)
    z = _logits(Hidden, Weight, t, v, T, V, dim, ht, wv, BT, BV, BK, EVEN)
    live = t < T
    target = tl.load(Targets + t, mask=live, other=-1)
    lse = tl.load(Lse + t, mask=live, other=0.0)
    grad = tl.load(GLogp + t, mask=live, other=0.0)
    p = tl.exp2((z * scale - lse[:, None]) * 1.4426950408889634)  # [BT, BV]
    # 2. Their gradient into the workspace.
    dz = grad[:, None] * (tl.where(v[None, :] == target[:, None], 1.0, 0.0) - p)
    at = DLogits + t.to(tl.int64)[:, None] * dt + (v - begin)[None, :]
    dz = (dz * scale).to(DLogits.dtype.element_ty)
    tl.store(at, dz, mask=live[:, None] & (v[None, :] < end))


# ---- Launching ---------------------------------------------------------------------------------


def _config(kernel, dim):
    BT, BV, BK, warps, stages = CONFIGS[architecture()][kernel]
    return dict(BT=BT, BV=BV, BK=BK, EVEN=dim % BK == 0, num_warps=warps, num_stages=stages)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        logp, lse = _logprob(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        return logp

    @staticmethod
    def backward(ctx, g_logp):
        gradients = _logprob_grad(g_logp.contiguous(), *ctx.saved_tensors, ctx.temperature)
        return *gradients, None, None


def _logprob(hidden, weight, targets, temperature: float):
    """(log-probability, log-sum-exp) of each token, float32 [T]."""
    (T, dim), V = hidden.shape, len(weight)
    config = _config("forward", dim)
    rows, columns = -(-T // config["BT"]), -(-V // config["BV"])
    tiles = -(-columns // max(4 * cores(hidden) // rows, 1))  # a program's: about 4 waves
    splits = -(-columns // tiles)
    lse, logit = hidden.new_empty(2, splits, T, dtype=torch.float32)  # [splits, T]
    _logprob_forward[rows, splits](
        hidden, weight, targets, lse, logit, T, V, dim, dim, dim, tiles, LOG2E / temperature,
        **config,
    )  # fmt: skip
    total = lse.logsumexp(0)
    return logit.sum(0) - total, total


def _logprob_grad(g_logp, hidden, weight, targets, lse, temperature: float):
    """Gradients of hidden and weight."""
    (T, dim), V = hidden.shape, len(weight)
    config = _config("backward", dim)
    kind = hidden.dtype if hidden.dtype == torch.bfloat16 else torch.float32
    size = min(-(-WORKSPACE // T // config["BV"]) * config["BV"], V)
    work, h = hidden.new_empty(T, size, dtype=kind), hidden.to(kind)
    dh, dw = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(weight)
    for first in range(0, V, size):
        end = min(first + size, V)  # 1. d logits of a slice of the vocabulary
        _logprob_backward[-(-T // config["BT"]), -(-(end - first) // config["BV"])](
            hidden, weight, targets, lse, g_logp, work, T, V, dim, dim, dim, first, end, size,
            1 / temperature, **config,
        )  # fmt: skip
        dz = work[:, : end - first]  # 2. [T, slice], and two products of it
        dh += dz @ weight[first:end].to(kind)
        dw[first:end] = dz.T @ h
    return dh.to(hidden.dtype), dw
