"""Log-probabilities of target tokens straight from hidden states, never storing [T, V]."""

import torch

CHUNK = 1 << 20  # logits alive at once: 4 MiB in float32, small enough for a CPU's caches


def linear_logprob(hidden, weight, targets, temperature: float = 1.0, entropy: bool = False):
    """log softmax(hidden @ weight.T / temperature)[targets], without the logits.

    hidden [T, d], weight [V, d], targets int64 [T] with -100 where ignored.  Returns logp float32
    [T], or (logp, entropy of the distribution) on request; both are 0 at ignored targets.
    """
    keep = (targets != -100).nonzero().squeeze(1)
    if len(keep) < len(targets):
        kept = linear_logprob(hidden[keep], weight, targets[keep], temperature, entropy)
        fill = lambda x: x.new_zeros(len(targets)).index_put((keep,), x)  # noqa: E731
        return tuple(map(fill, kept)) if entropy else fill(kept)
    logp, ent = _Chunked.apply(hidden, weight, targets, temperature, entropy)
    return (logp, ent) if entropy else logp


class _Chunked(torch.autograd.Function):
    """Walks over slices of the vocabulary, forward and again backward, in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy):
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
        top = h.new_full((len(h),), -torch.inf)  # running maximum, [T]
        total, mean, logit = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for first, w in slices(weight, len(h)):
            z = h @ w.to(h.dtype).T  # [T, chunk]
            row, column = inside(targets, first, len(w))
            logit[row] = z[row, column]
            new = torch.maximum(top, z.amax(1))
            p, fade = (z - new[:, None]).exp_(), (top - new).exp()
            total = total * fade + p.sum(1)
            mean = mean * fade + torch.linalg.vecdot(p, z) if entropy else mean
            top = new
        lse = top + total.log()
        ent = lse - mean / total
        ctx.save_for_backward(hidden, weight, targets, lse, ent)
        ctx.temperature, ctx.entropy = temperature, entropy
        return logit - lse, ent

    @staticmethod
    def backward(ctx, g_logp, g_ent):
        hidden, weight, targets, lse, ent = ctx.saved_tensors
        h = hidden.to(lse.dtype) / ctx.temperature
        dh, dw = torch.zeros_like(h), torch.empty_like(weight)
        for first, w in slices(weight, len(h)):
            w = w.to(h.dtype)
            z = torch.addmm(-lse[:, None], h, w.T)  # log p, [T, chunk]
            p = z.exp()
            if ctx.entropy:  # d entropy / d z = -p * (log p + entropy)
                p.mul_(z.add_(ent[:, None]).mul_(-g_ent[:, None]).sub_(g_logp[:, None]))
            else:
                p.mul_(-g_logp[:, None])
            row, column = inside(targets, first, len(w))
            p[row, column] += g_logp[row]  # now d z
            dh.addmm_(p, w)
            dw[first : first + len(w)] = p.T @ h
        return (dh / ctx.temperature).to(hidden.dtype), dw, None, None, None


def slices(weight, rows: int):
    """(first row, slice) of the vocabulary, as many rows a slice as CHUNK logits allow."""
    size = max(CHUNK // max(rows, 1), 128)
    return [(first, weight[first : first + size]) for first in range(0, len(weight), size)]


def inside(targets, first: int, size: int):
    """(positions, columns) of the targets that fall in the slice [first, first + size)."""
    row = ((targets >= first) & (targets < first + size)).nonzero().squeeze(1)
    return row, targets[row] - first
