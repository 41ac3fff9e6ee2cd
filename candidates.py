"""The pool of a step: original suffix, rewrite and rollouts of every prefix, and their rewards.

In: a batch of the stream, the policy, a rewriter. Out: a Pool; whoever asks the judge about it puts
the coming answer into `Pool.scores`. Also what a log tells of a pool, and pools for checkpoints.
"""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from config import Config
from data import Batch
from rollout import sample_rollouts
from support.command import wait
from support.runlog import Clock
from support.settings import names


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
    scores: Future | None = None  # of judge.Scores


def suffixes(batch: Batch, eos: int) -> Part:
    """The original suffixes, C = 1, each to its first end of text (a document's is its last)."""
    B, N = batch.suffix.shape
    texts = [[text] for text in batch.suffix_text]
    ended = (batch.suffix == eos).cumsum(dim=1) > 0  # [B, N]
    lengths = (~ended).sum(dim=1, keepdim=True).add(1).clamp(max=N)  # [B, 1]
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
    tokens, lengths = drawn.tokens.cpu(), drawn.lengths.cpu()  # [B, K, N], [B, K]
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


def make_pool(policy, batch: Batch, rewriter, config: Config, tokenizer, clock: Clock) -> Pool:
    """The sources of config.candidates for every prefix, in that order: C = 1 + 1 + K at most.

    rewriter: a rewrite.Rewriter, or None without rewrites; clock: where the seconds are counted.
    """
    wanted, parts = names(config.candidates), {}
    with clock("rollout"):
        if "rewrite" in wanted:  # asked first: the rewriter works while we sample
            index = batch.index.tolist()
            asked = rewriter.rewrite(batch.prefix_text, batch.suffix_text, index)
        if "suffix" in wanted:
            parts["suffix"] = suffixes(batch, tokenizer.eos)
        if "rollouts" in wanted:
            parts["rollouts"] = rollouts(policy, batch, config, tokenizer)
    if "rewrite" in wanted:
        with clock("judge_wait"):
            passages = wait(asked)
        parts["rewrite"] = rewrites(passages, config.chunk, tokenizer)
    pool = [parts[name] for name in wanted]
    return Pool(
        batch,
        torch.cat([part.tokens for part in pool], dim=1),  # [B, C, N]
        torch.cat([part.lengths for part in pool], dim=1),  # [B, C]
        torch.cat([part.old for part in pool], dim=1),  # [B, C, N]
        [sum(rows, []) for rows in zip(*(part.texts for part in pool), strict=True)],
        [part.source for part in pool for _ in range(part.tokens.shape[1])],
    )


def statistics(pool: Pool, scores, judged: bool) -> dict:
    """What the log tells of a pool, as {name: (sum, count)}; nan rewards are left out."""

    def mean(values):
        values = torch.from_numpy(values)
        values = values[~values.isnan()]
        return float(values.sum()), values.numel()

    out: dict[str, tuple[float, int]] = {}
    sources = np.array(pool.sources)
    if judged:
        out["reward"] = mean(scores.reward)
        out |= {f"reward.{kind}": mean(values) for kind, values in scores.by_kind.items()}
        for source in sorted(set(pool.sources)):
            out[f"reward.{source}"] = mean(scores.reward[:, sources == source])
        for name in ("calls", "failed", "absent"):
            out[f"judge.{name}"] = (getattr(scores, name), 0)
    if "rewrite" in pool.sources:
        out["rewrite.failed"] = (sum(text is None for row in pool.texts for text in row), 0)
    if "rollout" in pool.sources:
        out |= of_rollouts(pool, torch.from_numpy(sources == "rollout"))
    return out


def of_rollouts(pool: Pool, mask) -> dict:
    """Their tokens, length, surprise (nats a token), repetition within each and the share that
    holds the phrase that most of them hold; mask bool [C]."""
    tokens, lengths = pool.tokens[:, mask].flatten(0, 1), pool.lengths[:, mask].flatten()
    total, count = int(lengths.sum()), len(lengths)
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    phrases = Counter(phrase for row in rows for phrase in set(grams(row, 5)))
    return {
        "rollout.tokens": (total, 0),
        "rollout.length": (total, count),
        "rollout.nll": (-float(pool.old.sum()), total),
        "rollout.repeated": (sum(map(repeated_share, rows)), count),
        "rollout.alike": (max(phrases.values(), default=0), count),
    }


def repeated_share(ids: list) -> float:
    """Share of a rollout's 3-grams that it has already used: 1 when it says one thing for ever."""
    used = grams(ids, 3)
    return 1 - len(set(used)) / len(used) if used else 0.0


def grams(ids: list, n: int) -> list[tuple]:
    """Its sequences of n tokens."""
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def example(pool: Pool, scores) -> str:
    """One prefix, its candidates with their rewards, and a verdict of each kind: look at it."""
    out, named = [f"    prefix   {pool.batch.prefix_text[0][-300:]!r}"], {}
    rows = zip(pool.sources, pool.texts[0], scores.reward[0].tolist(), strict=True)
    for n, (source, text, value) in enumerate(rows):
        out.append(f"    {source:8} {value:5.2f}  {text!r}")
        named.setdefault(text, f"{source} {pool.sources[: n + 1].count(source)}")
    firsts: dict = {}
    for seen in scores.examples:
        firsts.setdefault(seen["kind"], seen)
    for seen in firsts.values():
        shown = " against ".join(named.get(text, "?") for text in seen["candidates"])
        out.append(f"    {seen['kind']} of {shown}: {seen['verdict']}: {seen['answer']!r}")
    return "\n".join(out)


def pack(pool: Pool) -> dict:
    """A pool as plain values and tensors, for the checkpoint of an overlapped run."""
    return {**vars(pool), "batch": vars(pool.batch), "scores": None}


def unpack(saved: dict) -> Pool:
    """The Pool that `pack` was given, on the CPU and not yet asked about."""
    return Pool(**{**saved, "batch": Batch(**saved["batch"])})


def autocast(config: Config, device: torch.device):
    """float32 weights and bfloat16 arithmetic where config.dtype asks for it."""
    on = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # Cached casts of a spread policy's layers would be a whole copy of it.
    return torch.autocast(device.type, torch.bfloat16, on, cache_enabled=not config.shard)
