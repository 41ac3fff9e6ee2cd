"""The sampler: K continuations of each prefix, the prefix computed and cached once.

In: left-padded prefixes [B, P] of unequal length. Out: tokens [B, K, N], how many of them count,
and the log-probability of each under the model at the sampling temperature.

Attention runs over a two-part cache: the prefix part is read once per step for all K rollouts of a
prefix, the continuation part belongs to one rollout (kernels/attention.py). Randomness is counted,
not streamed: the uniform number behind token t of rollout k is a hash of (seed, the prefix's index
in the run, k, t). It depends neither on what shares the batch nor on what was sampled before, so
the same batch gives the same rollouts in a resumed run, bit for bit.

Another batch may not: what shares it and how it is padded moves the logits in their last bits, and
with them the sums that the uniform number is looked up in. Measured at temperature 1 on a
vocabulary of 49,152, between 8 and 192 rows: log-probabilities differed by 5e-5, and 8 to 10 % of
the answers of 48 tokens had another token somewhere. Greedy decoding differs only at ties.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from kernels import use_triton
from kernels.attention import decode_attention
from kernels.cpu_layers import fast_layers
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
    x = mix(torch.tensor(signed(seed)))  # []; unmixed, seed s at index i were seed i at index s
    # [B, 1, 1], then [B, K, 1], then [B, K, N]
    for axis in (index.cpu()[:, None, None], torch.arange(K)[:, None], torch.arange(N)):
        x = mix((x ^ axis) + signed(0x9E3779B97F4A7C15))
    return (((x >> 41) & (2**23 - 1)).float() + 0.5) / 2**23  # one bit more would round to 1


def sample(logits, u, temperature: float, top_p: float):
    """One token per row by inverting the cumulative distribution at u.

    logits [R, V], u [R] in (0, 1) -> tokens int64 [R], log-probabilities float32 [R] at the
    temperature. top_p keeps the most likely tokens until their sum reaches it; the log-probability
    stays that of the full softmax, which is what the trainer computes. temperature 0 is greedy,
    with log-probabilities at temperature 1.
    """
    scaled = logits.float() / temperature if temperature not in (0, 1) else logits.float()
    mass = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()  # [R, V], not yet divided by its sum
    total = mass.sum(dim=-1, keepdim=True)  # [R, 1]
    if temperature == 0:
        tokens = scaled.argmax(dim=-1, keepdim=True)
    else:
        kept, order = mass, None
        if top_p < 1:
            kept, order = mass.sort(dim=-1, descending=True)  # [R, V] each
            kept = kept * (kept.cumsum(dim=-1) - kept < top_p * total)
        cdf = kept.cumsum(dim=-1)  # [R, V]
        # First index whose cumulative mass exceeds u: a token without mass is never it.
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # [R, 1]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        tokens = tokens if order is None else order.gather(1, tokens)
    return tokens.squeeze(1), (mass.gather(1, tokens) / total).log().squeeze(1)


class PrefixCache:
    """A prefix computed once, and what each of its K continuations adds to it token by token."""

    def __init__(self, model: Llama, prefix, pad, K: int, N: int):
        """prefix int64 [B, P] left-padded, pad int [B]; `first`: logits [B, V] after the prefix."""
        (B, P), c, device = prefix.shape, model.config, prefix.device
        self.model, self.pad = model, pad
        dtype = model.compute_dtype

        def cache(*shape):
            shape = (c.n_layer, 2, *shape, c.head_dim)
            return torch.empty(shape, dtype=dtype, device=device)

        self.prefix = cache(B, c.n_kv_head, P)  # [L, 2, B, Hkv, P, D]: keys and values
        # As many prefixes at a time as need no more memory than the continuations will.
        numbers = K * N * 2 * c.n_layer * c.n_kv_head * c.head_dim
        rows = max(1, B * numbers // (P * (4 * c.d_ff + 8 * c.d_model)))
        parts = prefix.split(rows), pad.split(rows), self.prefix.split(rows, dim=2)
        last = [model(t, p, P, 0, kv)[:, -1].clone() for t, p, kv in zip(*parts, strict=True)]
        self.first = model.lm_head(torch.cat(last))
        self.own = cache(B, K, c.n_kv_head, N)  # [L, 2, B, K, Hkv, N, D]
        after_prefix = (P - pad)[:, None] + torch.arange(N, device=device)
        self.cos, self.sin = rope_tables(c, after_prefix)  # [B, 1, N, D]

        self.token = prefix.new_zeros(B, K)
        self.at = prefix.new_zeros(1)  # tokens of each continuation computed so far
        graphed = self.prefix.is_cuda and use_triton(self.prefix)
        # Not self.compute: an object that holds itself keeps its caches until a collection.
        self.replay = self.capture() if graphed else None

    def step(self, token):
        """token int64 [B, K], the newest of each continuation -> logits [B, K, V] of the next."""
        self.token.copy_(token)
        self.replay() if self.replay else self.compute()
        self.at += 1
        return self.logits

    def compute(self):
        """self.logits from self.token and self.at, with nothing that a CUDA graph cannot repeat."""
        cos, sin = self.cos.index_select(2, self.at), self.sin.index_select(2, self.at)
        filled = (self.at + 1).int()

        def attend(q, k, v, prefix, own):  # q [B, H, K, D]: the K rollouts stand where T stood
            for cache, new in zip(own, (k, v), strict=True):
                cache.index_copy_(3, self.at, new.transpose(1, 2).unsqueeze(3))
            q = q.transpose(1, 2)
            return decode_attention(q, *prefix, self.pad, *own, filled).flatten(2)

        model = self.model
        x = model.model.embed_tokens(self.token)  # [B, K, d]
        for layer, prefix, own in zip(model.model.layers, self.prefix, self.own, strict=True):
            x = layer(x, cos, sin, partial(attend, prefix=prefix, own=own))
        self.logits = model.lm_head(model.model.norm(x))

    def capture(self):
        """compute() as a CUDA graph: a step is one launch instead of some thirty a layer."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute()  # compiles kernels and casts weights; the first step writes the same
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph.replay


def prefixes_at_once(model: Llama, P: int, K: int, N: int) -> int:
    """How many prefixes' caches fit into four fifths of a GPU's free memory."""
    c, device = model.config, model.lm_head.weight.device
    if device.type != "cuda":
        return sys.maxsize
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + idle  # bytes
    numbers = (P + K * N) * 2 * c.n_layer * c.n_kv_head * c.head_dim
    return max(1, int(0.8 * free / (numbers * model.compute_dtype.itemsize)))


@torch.no_grad()
def sample_rollouts(
    model: Llama, prefix, pad, K: int, N: int, *, eos, seed: int, index, temperature=1.0, top_p=1.0
) -> Rollouts:
    """Sample K continuations of at most N tokens of every prefix.

    prefix int64 [B, P] left-padded, pad int [B], index int64 [B] keys each prefix's randomness.
    temperature 0 is greedy. eos is an id or a sequence of ids: a rollout ends with the first that
    it meets, or after N tokens; the first that is named fills what follows. What does not fit into
    the memory of a GPU together is sampled in turns.
    """
    (B, P), device = prefix.shape, prefix.device
    if (size := prefixes_at_once(model, P, K, N)) < B:
        how: dict = dict(eos=eos, seed=seed, temperature=temperature, top_p=top_p)
        turns = zip(prefix.split(size), pad.split(size), index.split(size), strict=True)
        parts = [vars(sample_rollouts(model, x, p, K, N, index=i, **how)) for x, p, i in turns]
        return Rollouts(*map(torch.cat, zip(*(part.values() for part in parts), strict=True)))
    ends = torch.tensor([eos] if isinstance(eos, int) else eos, device=device)
    u = uniforms(seed, index, K, N).to(device)
    tokens = ends[0].expand(B, K, N).clone()
    logprobs = torch.zeros(B, K, N, device=device)
    running = torch.ones(B, K, dtype=torch.bool, device=device)
    lengths = prefix.new_zeros(B, K)
    for t, (token, logp) in enumerate(decode(model, prefix, pad, u, temperature, top_p)):
        token = tokens[:, :, t] = torch.where(running, token, ends[0])  # [B, K]
        logprobs[:, :, t] = logp.masked_fill(~running, 0.0)
        lengths += running  # the token that ends a rollout counts
        running &= ~torch.isin(token, ends)
        if not running.any():
            break
    return Rollouts(tokens, lengths, logprobs)


@torch.no_grad()
def decode(model: Llama, prefix, pad, u, temperature: float, top_p: float) -> Iterator[tuple]:
    """The sampler token by token: (token int64 [B, K], its log p float32 [B, K]), N times at most.

    u [B, K, N]: the uniform number behind each token. Whoever has read enough just stops.
    """
    K, N = u.shape[1:]
    with fast_layers(model):
        cached = PrefixCache(model, prefix, pad, K, N)
        logits = cached.first.repeat_interleave(K, dim=0)  # [B * K, V]
        for t in range(N):
            token, logp = sample(logits, u[:, :, t].reshape(-1), temperature, top_p)  # [B * K]
            token = token.view(-1, K)
            yield token, logp.view(-1, K)
            if t < N - 1:
                logits = cached.step(token).flatten(0, 1)  # [B * K, V]
