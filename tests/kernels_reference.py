"""What the kernels must compute, as slowly and plainly as possible, in float64."""

import torch


def attention(q, k, v, pad, prefix, length):
    """Masked softmax over the whole row; the mask is written out from the geometry."""
    B, H, T, D = q.shape
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    visible = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        p = int(pad[b])
        for i in range(p, T):
            visible[b, i, p : min(i + 1, prefix)] = True
            if i >= prefix:
                first = prefix + (i - prefix) // length * length
                visible[b, i, first : i + 1] = True
    scores = (q @ k.mT * D**-0.5).masked_fill(~visible[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v  # padding sees nothing: 0


def decode(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    """One rollout after another: its prefix and its own keys side by side."""
    out = torch.empty(q.shape, dtype=torch.float64)
    B, K, H, D = q.shape
    for b in range(B):
        for r in range(K):
            k = torch.cat([k_prefix[b, :, pad[b] :], k_cont[b, r, :, :filled]], 1).double()
            v = torch.cat([v_prefix[b, :, pad[b] :], v_cont[b, r, :, :filled]], 1).double()
            k, v = (x.repeat_interleave(H // len(x), 0) for x in (k, v))
            weights = (q[b, r, :, None].double() @ k.mT * D**-0.5).softmax(-1)
            out[b, r] = (weights @ v)[:, 0]
    return out


def logprob(hidden, weight, targets, temperature):
    """Log-softmax of all logits, 0 where ignored."""
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    kept = targets != -100
    return logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * kept


def rows(B, H, Hkv, P, N, C, D, dtype=torch.float32, ragged=True, seed=0):
    """(q, k, v, pad) with the strides a model's projections have, ready for autograd."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(B, P + C * N, h, D, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = (draw(h).to(dtype).transpose(1, 2).requires_grad_() for h in (H, Hkv, Hkv))
    pad = torch.randint(0, P + 1, (B,), generator=generator) if ragged else torch.zeros(B)
    return q, k, v, pad.int()


def caches(B, K, H, Hkv, P, N, D, dtype=torch.float32, seed=0):
    """(q, k_prefix, v_prefix, pad, k_cont, v_cont); row 0 unpadded, the last all padding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    prefix, cont = [draw(B, Hkv, P, D) for _ in "kv"], [draw(B, K, Hkv, N, D) for _ in "kv"]
    prefix[0] *= torch.linspace(0.2, 3, P)[:, None].to(dtype)  # the maximum moves along the prefix
    pad = torch.linspace(0, P, B).int()
    return draw(B, K, H, D), *prefix, pad, *cont


def error(value, reference):
    """Largest difference, relative to the largest magnitude of the reference; nan if any is."""
    value, reference = value.detach().double().cpu(), reference.detach().double()
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-3))
