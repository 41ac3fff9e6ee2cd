"""The pool of a step: original suffix, rewrite and rollouts of every prefix, and their rewards.

In: a batch of the stream, the policy, the teachers. Out: a Pool whose rewards arrive later.
"""

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from config import Config, names
from data import Batch
from rollout import sample_rollouts


@dataclass
class Part:
    """The candidates of one source, C of them for each of B prefixes."""

    source: str  # suffix, rewrite or rollout
    tokens: torch.Tensor  # int64 [B, C, N]
    lengths: torch.Tensor  # int64 [B, C]
    old: torch.Tensor  # float32 [B, C, N]: log p of a rollout when it was sampled, else 0
    texts: list  # [B][C], None where the rewriter failed


@dataclass
class Pool:
    """All candidates of one batch, on their way from the sampler to the judge to the update."""

    batch: Batch
    tokens: torch.Tensor  # as in Part, over all sources
    lengths: torch.Tensor
    old: torch.Tensor
    texts: list
    sources: list  # [C] of suffix, rewrite, rollout
    seconds: dict
    scores: Future | None = None  # judge.Scores


def suffixes(batch: Batch, eos: int) -> Part:
    """The original suffixes, C = 1, each to its first end of text (a document's is its last)."""
    B, N = batch.suffix.shape
    texts = [[text] for text in batch.suffix_text]
    ended = (batch.suffix == eos).cumsum(dim=1) > 0
    lengths = (~ended).sum(dim=1, keepdim=True).add(1).clamp(max=N)
    return Part("suffix", batch.suffix[:, None], lengths, torch.zeros(B, 1, N), texts)


def rollouts(policy, batch: Batch, config: Config, tokenizer) -> Part:
    """K continuations of the policy itself, C = K."""
    device = next(policy.parameters()).device
    with autocast(config, device):
        drawn = sample_rollouts(
            policy,
            batch.prefix.to(device),
            batch.pad.to(device),
            config.rollouts,
            config.chunk,
            eos=(tokenizer.eos, *policy.end_tokens),
            seed=config.seed,
            index=batch.index,
            temperature=config.temperature,
            top_p=config.top_p,
        )
    tokens, lengths = drawn.tokens.cpu(), drawn.lengths.cpu()
    texts = [
        [tokenizer.decode(row[:n]) for row, n in zip(rows, ns, strict=True)]
        for rows, ns in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    return Part("rollout", tokens, lengths, drawn.logprobs.cpu(), texts)


def rewrites(passages: list, chunk: int, tokenizer) -> Part:
    """The rewriter's passages (None: it failed), C = 1, cut to the chunk in tokens."""
    B = len(passages)
    tokens, lengths = torch.full((B, 1, chunk), tokenizer.eos), torch.zeros(B, 1, dtype=torch.int64)
    texts = [[None] for _ in range(B)]
    for b, passage in enumerate(passages):
        if passage is not None and (ids := tokenizer.encode(passage, continues=True)[:chunk]):
            tokens[b, 0, : len(ids)] = torch.tensor(ids)
            lengths[b, 0], texts[b] = len(ids), [tokenizer.decode(ids)]
    return Part("rewrite", tokens, lengths, torch.zeros(B, 1, chunk), texts)


def make_pool(policy, batch: Batch, teachers, config: Config, tokenizer) -> Pool:
    """The sources of config.candidates for every prefix, in that order."""
    wanted, began, parts = names(config.candidates), time.time(), {}
    if "rewrite" in wanted:  # asked first: the rewriter works while we sample
        index = batch.index.tolist()
        asked = teachers.rewriter.rewrite(batch.prefix_text, batch.suffix_text, index)
    if "suffix" in wanted:
        parts["suffix"] = suffixes(batch, tokenizer.eos)
    if "rollouts" in wanted:
        parts["rollouts"] = rollouts(policy, batch, config, tokenizer)
    rolled = time.time()
    if "rewrite" in wanted:
        parts["rewrite"] = rewrites(teachers.wait(asked), config.chunk, tokenizer)
    seconds = {"rollout": rolled - began, "judge_wait": time.time() - rolled}
    pool = [parts[name] for name in wanted]
    return Pool(
        batch,
        torch.cat([part.tokens for part in pool], dim=1),
        torch.cat([part.lengths for part in pool], dim=1),
        torch.cat([part.old for part in pool], dim=1),
        [sum(rows, []) for rows in zip(*(part.texts for part in pool), strict=True)],
        [part.source for part in pool for _ in range(part.tokens.shape[1])],
        seconds,
    )


def ask(pool: Pool, teachers, config: Config, step: int):
    """Send a pool to the judge; the answers are awaited when the update needs them."""
    if config.rewards:
        pool.scores = teachers.score(step, pool)


def rewards_of(pool: Pool, teachers):
    """(rewards float [B, C], judge.Scores or None). Without a judge the first candidate wins."""
    if pool.scores is None:
        B, C = pool.lengths.shape
        rank = -torch.arange(C, dtype=torch.float64).expand(B, C)
        return rank.masked_fill(pool.lengths == 0, math.nan), None
    scores = teachers.wait(pool.scores)
    return torch.from_numpy(scores.reward), scores


def pack(pool: Pool) -> dict:
    """A pool as plain values and tensors, for the checkpoint of an overlapped run."""
    kept = ("tokens", "lengths", "old", "texts", "sources")
    return {name: getattr(pool, name) for name in kept} | {"batch": vars(pool.batch)}


def unpack(saved: dict) -> Pool:
    """The Pool that `pack` was given, on the CPU and not yet asked about: scores None, no times."""
    fields = {name: value for name, value in saved.items() if name != "batch"}
    return Pool(batch=Batch(**saved["batch"]), seconds={}, **fields)


def autocast(config: Config, device: torch.device):
    """float32 weights and bfloat16 arithmetic where config.dtype asks for it."""
    on = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # Cached casts of a spread policy's layers would be a whole copy of it.
    return torch.autocast(device.type, torch.bfloat16, on, cache_enabled=not config.shard)
