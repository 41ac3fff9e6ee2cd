"""The sampler: K continuations of each prefix, the prefix computed and cached once.

In: left-padded prefixes [B, P] of unequal length. Out: tokens [B, K, N], how many of them count,
and the log-probability of each under the model at the sampling temperature.

Attention runs over a two-part cache: the prefix part is read once per step for all K rollouts of a
prefix, the continuation part belongs to one rollout (kernels/attention.py). Randomness is counted,
not streamed: the uniform number behind token t of rollout k is a hash of (seed, the prefix's index
in the run, k, t), so a rollout depends neither on what shares its batch nor on what was sampled
before, and a resumed run repeats it.
"""

from dataclasses import dataclass

import torch

from kernels.attention import decode_attention
from model import Llama, rope_tables


@dataclass
class Rollouts:
    tokens: torch.Tensor  # int64 [B, K, N]; end-of-text fills what follows a stop
    lengths: torch.Tensor  # int64 [B, K], the end-of-text token included
    logprobs: torch.Tensor  # float32 [B, K, N], 0 beyond the length


def signed(x: int) -> int:
    """The int64 with the bits of x."""
    return (x + 2**63) % 2**64 - 2**63


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, wrapping around as uint64 does."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: int, index: torch.Tensor, K: int, N: int) -> torch.Tensor:
    """Counter-based uniform numbers in (0, 1): float32 [B, K, N] keyed by (seed, index, k, n)."""
    x = torch.tensor(signed(seed), dtype=torch.int64)
    for axis in (index.cpu()[:, None, None], torch.arange(K)[:, None], torch.arange(N)):
        x = mix((x ^ axis) + signed(0x9E3779B97F4A7C15))
    return (((x >> 40) & (2**24 - 1)).float() + 0.5) / 2**24


def sample(logits, u, temperature: float, top_p: float):
    """One token per row by inverting the cumulative distribution at u.

    logits [R, V], u [R] in (0, 1) -> tokens int64 [R], log-probabilities float32 [R] at the
    temperature. top_p keeps the most likely tokens until their sum reaches it; the log-probability
    stays that of the full softmax, which is what the trainer computes. temperature 0 is greedy,
    with log-probabilities at temperature 1.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logp.argmax(dim=-1)
    else:
        probs, order = logp.exp(), None
        if top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True)
            probs = probs * (probs.cumsum(dim=-1) - probs < top_p)
        cdf = probs.cumsum(dim=-1)
        # First index whose cumulative mass exceeds u: a token without mass is never it.
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        tokens = (tokens if order is None else order.gather(1, tokens)).squeeze(1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


@torch.no_grad()
def rollout(
    model: Llama,
    prefix,
    pad,
    K: int,
    N: int,
    *,
    eos: int,
    seed: int,
    index,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollouts:
    """Sample K continuations of at most N tokens of every prefix.

    prefix int64 [B, P] left-padded, pad int [B], index int64 [B] keys each prefix's randomness.
    temperature 0 is greedy. A rollout ends with `eos` or after N tokens.
    """
    B, P = prefix.shape
    device, c = prefix.device, model.config
    u = uniforms(seed, index, K, N).to(device)
    cache = []
    hidden = model(prefix, pad, P, 0, cache)[:, -1]  # [B, d]; only the last token predicts
    shape = (B, K, c.n_kv_head, N, c.head_dim)
    own = [(k.new_empty(shape), v.new_empty(shape)) for k, v in cache]  # continuation part
    after_prefix = (P - pad)[:, None] + torch.arange(N, device=device)
    cos, sin = rope_tables(c, after_prefix)  # [B, 1, N, D]

    tokens = prefix.new_full((B, K, N), eos)
    logprobs = torch.zeros(B, K, N, device=device)
    running = torch.ones(B, K, dtype=torch.bool, device=device)
    lengths = prefix.new_zeros(B, K)
    logits = model.logits(hidden)[:, None].expand(B, K, -1)
    for t in range(N):
        token, logp = sample(logits.reshape(B * K, -1), u[:, :, t].reshape(-1), temperature, top_p)
        token = token.view(B, K).masked_fill(~running, eos)
        tokens[:, :, t] = token
        logprobs[:, :, t] = logp.view(B, K).masked_fill(~running, 0.0)
        lengths += running
        running &= token != eos
        if t == N - 1 or not running.any():
            break
        x = model.model.embed_tokens(token)  # [B, K, d]: the K rollouts stand where T stood
        for layer, (k_prefix, v_prefix), (k_own, v_own) in zip(
            model.model.layers, cache, own, strict=True
        ):
            q, k, v = layer.before(x, cos[:, :, t : t + 1], sin[:, :, t : t + 1])  # [B, H, K, D]
            k_own[:, :, :, t], v_own[:, :, :, t] = k.transpose(1, 2), v.transpose(1, 2)
            attended = decode_attention(
                q.transpose(1, 2), k_prefix, v_prefix, pad, k_own, v_own, t + 1
            )
            x = layer.after(x, attended.flatten(2))
        logits = model.logits(model.model.norm(x))
    return Rollouts(tokens, lengths, logprobs)
