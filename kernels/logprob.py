"""Log-probabilities of target tokens straight from hidden states, never storing [T, V]."""

import torch

CHUNK = 1 << 22  # logits alive at once: 16 MiB in float32, which stays within a CPU's last cache


def linear_logprob(hidden, weight, targets, temperature: float = 1.0, entropy: bool = False):
    """log softmax(hidden @ weight.T / temperature)[targets], without the logits.

    hidden [T, d], weight [V, d], targets int64 [T] with -100 where ignored.  Returns logp float32
    [T], or (logp, entropy of the distribution) on request; both are 0 at ignored targets.
    """
    logp, ent = linear_logprob_torch(hidden, weight, targets, temperature)
    return (logp, ent) if entropy else logp


def linear_logprob_torch(hidden, weight, targets, temperature: float = 1.0):
    keep = (targets != -100).nonzero().squeeze(1)
    if len(keep) == len(targets):
        return _Chunked.apply(hidden, weight, targets, temperature)
    kept = _Chunked.apply(hidden[keep], weight, targets[keep], temperature)
    return tuple(x.new_zeros(len(targets)).index_put((keep,), x) for x in kept)


class _Chunked(torch.autograd.Function):
    """Walks over slices of the vocabulary, forward and again backward, in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
        lse = h.new_full((len(h),), -torch.inf)
        mean, logit = torch.zeros_like(lse), torch.zeros_like(lse)  # E[logit]; logit of the target
        for first, w in slices(weight, len(h)):
            z = h @ w.to(h.dtype).T  # [T, chunk]
            inside = (targets >= first) & (targets < first + len(w))
            at = (targets - first).clamp(0, len(w) - 1)
            logit += torch.where(inside, z.gather(1, at[:, None]).squeeze(1), 0.0)
            part = z.logsumexp(1)
            total = torch.logaddexp(lse, part)
            p = z.sub(total[:, None]).exp_()
            mean = mean * (lse - total).exp() + torch.linalg.vecdot(p, z)
            lse = total
        ctx.save_for_backward(hidden, weight, targets, lse, lse - mean)
        ctx.temperature = temperature
        return logit - lse, lse - mean

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, lse, ent = ctx.saved_tensors
        h = hidden.to(lse.dtype) / ctx.temperature
        dh, dw = torch.zeros_like(h), torch.empty_like(weight)
        for first, w in slices(weight, len(h)):
            w = w.to(h.dtype)
            logp = h @ w.T - lse[:, None]  # [T, chunk]
            dz = -logp.exp() * (g_logp[:, None] + g_entropy[:, None] * (logp + ent[:, None]))
            row = ((targets >= first) & (targets < first + len(w))).nonzero().squeeze(1)
            dz[row, targets[row] - first] += g_logp[row]
            dh += dz @ w
            dw[first : first + len(w)] = dz.T @ h
        return (dh / ctx.temperature).to(hidden.dtype), dw, None, None


def slices(weight, rows: int):
    """(first row, slice) of the vocabulary, as many rows a slice as CHUNK logits allow."""
    size = max(CHUNK // max(rows, 1), 128)
    return [(first, weight[first : first + size]) for first in range(0, len(weight), size)]
