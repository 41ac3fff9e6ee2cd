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
    B, H, T, D = q.shape
    G = H // k.shape[1]
    C = (T - prefix) // length if length else 0
    column = torch.arange(prefix, device=q.device)
    real = column >= pad[:, None]  # [B, P]
    rows = []
    if prefix:
        # Padding queries see themselves so that no row of the softmax is empty; zeroed below.
        visible = (real[:, None, :] | torch.eye(prefix, dtype=torch.bool, device=q.device)).tril()
        qp, kp, vp = (x[:, :, :prefix] for x in (q, k, v))
        if not pad.any():
            out = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, enable_gqa=G > 1)
        else:
            mask = visible[:, None]
            out = F.scaled_dot_product_attention(qp, kp, vp, attn_mask=mask, enable_gqa=G > 1)
            out = out.masked_fill(~real[:, None, :, None], 0.0)
        rows.append(out)
    if C:
        qc = q[:, :, prefix:].reshape(B, -1, G, C, length, D)
        kc, vc = (x[:, :, prefix:].reshape(B, -1, 1, C, length, D) for x in (k, v))
        shared = qc.flatten(2, 4) @ k[:, :, :prefix].mT  # [B, Hkv, G*C*N, P]
        shared = shared.masked_fill(~real[:, None, None, :], -torch.inf)
        own = qc @ kc.mT  # [B, Hkv, G, C, N, N]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        own = own.masked_fill(future, -torch.inf)
        scores = torch.cat([shared.view(*own.shape[:-1], prefix), own], -1) * D**-0.5
        weights = scores.softmax(-1)
        out = (weights[..., :prefix].flatten(2, 4) @ v[:, :, :prefix]).view(qc.shape)
        out = out + weights[..., prefix:] @ vc
        rows.append(out.reshape(B, H, C * length, D))
    return torch.cat(rows, 2) if rows else torch.empty_like(q)


def decode_attention_torch(q, k_prefix, v_prefix, pad, k_cont, v_cont, filled):
    B, K, H, D = q.shape
    Hkv, P = k_prefix.shape[1:3]
    N = int(filled)
    grouped = q.view(B, K, Hkv, H // Hkv, D)
    folded = grouped.transpose(1, 2).reshape(B, Hkv, K * (H // Hkv), D)
    shared = folded @ k_prefix.mT  # [B, Hkv, K*G, P]
    hidden = torch.arange(P, device=q.device) < pad[:, None]
    shared = shared.masked_fill(hidden[:, None, None, :], -torch.inf)
    own = grouped @ k_cont[:, :, :, :N].mT  # [B, K, Hkv, G, N]
    own = own.transpose(1, 2).reshape(B, Hkv, -1, N)
    weights = (torch.cat([shared, own], -1) * D**-0.5).softmax(-1)
    out = (weights[..., :P] @ v_prefix).view(B, Hkv, K, -1, D).transpose(1, 2)
    own = weights[..., P:].view(B, Hkv, K, -1, N).transpose(1, 2)  # [B, K, Hkv, G, N]
    return (out + own @ v_cont[:, :, :, :N]).reshape(B, K, H, D)
