"""Attention over one prefix and many continuations: training rows and two-part decoding."""

import torch
from torch.nn import functional as F


def prefix_attention(q, k, v, pad, prefix: int, length: int):
    """Attention over rows laid out [left-padded prefix | continuation 1 | ... | continuation C].

    q [B, H, T, D], k and v [B, Hkv, T, D] in any strides, T = prefix + C * length; pad int32 [B]
    counts the padding tokens at the left of each prefix.  Returns [B, H, T, D].
    """
    return prefix_attention_torch(q, k, v, pad, prefix, length)


def decode_attention(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    """Attention of one new token per rollout over a shared prefix and its own continuation.

    q [B, K, H, D]; k_prefix, v_prefix [B, Hkv, P, D]; pad int32 [B]; k_cont, v_cont
    [B, K, Hkv, N, D], of which the first `filled` positions (int, or int32 [1] on the device)
    are valid and include the new token's own.  Returns [B, K, H, D].
    """
    return decode_attention_torch(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled)


def prefix_attention_torch(q, k, v, pad, prefix: int, length: int):
    """The definition.  Padding is cut off first, so that it needs no mask and costs nothing."""
    if not pad.any():
        return unpadded_attention(q, k, v, prefix, length)
    rows = []
    for b, p in enumerate(pad.tolist()):
        qb, kb, vb = (x[b : b + 1, :, p:] for x in (q, k, v))
        rows.append(F.pad(unpadded_attention(qb, kb, vb, prefix - p, length), (0, 0, p, 0)))
    return torch.cat(rows)


def unpadded_attention(q, k, v, P: int, N: int):
    B, H, T, D = q.shape
    G = H // k.shape[1]
    if T - P <= N:  # at most one continuation: ordinary causal attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G > 1)
    out = unpadded_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], P, 0)
    qc = (q[:, :, P:] * D**-0.5).reshape(B, H // G, G, -1, N, D)  # [B, Hkv, G, C, N, D]
    kc, vc = (x[:, :, P:].reshape(B, H // G, 1, -1, N, D) for x in (k, v))
    shared = qc.flatten(2, 4) @ k[:, :, :P].mT  # [B, Hkv, G*C*N, P]
    own = (qc @ kc.mT).add_(q.new_full((N, N), -torch.inf).triu(1))  # [B, Hkv, G, C, N, N]
    weights = torch.cat([shared.view(*own.shape[:-1], P), own], -1).softmax(-1)
    cont = (weights[..., :P].flatten(2, 4) @ v[:, :, :P]).view(qc.shape) + weights[..., P:] @ vc
    return torch.cat([out, cont.reshape(B, H, T - P, D)], 2)


def decode_attention_torch(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    """The definition: one product per kv head reads the prefix for all its K*G queries."""
    B, K, H, D = q.shape
    Hkv, P = k_prefix.shape[1:3]
    N, G = int(filled), H // Hkv
    query = q.view(B, K, Hkv, G, D)
    folded = query.transpose(1, 2).reshape(B * Hkv, K * G, D)
    scores = q.new_empty(B, Hkv, K, G, P + N)
    scores[..., :P] = (folded @ k_prefix.flatten(0, 1).mT).view(B, Hkv, K, G, P)
    scores[..., P:] = (query @ k_cont[:, :, :, :N].mT).transpose(1, 2)
    for row, p in zip(scores, pad.tolist(), strict=True):
        row[..., :p] = -torch.inf
    weights = scores.mul_(D**-0.5).softmax(-1)
    shared = weights[..., :P].reshape(B * Hkv, K * G, P) @ v_prefix.flatten(0, 1)
    own = weights[..., P:].transpose(1, 2) @ v_cont[:, :, :, :N]  # [B, K, Hkv, G, D]
    return (shared.view(B, Hkv, K, G, D).transpose(1, 2) + own).reshape(B, K, H, D)
