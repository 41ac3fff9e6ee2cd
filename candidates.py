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
from rollout import rollout


@dataclass
class Pool:
    """The candidates of one batch, on their way from the sampler to the judge to the update."""

    batch: Batch
    tokens: torch.Tensor  # int64 [B, C, N]
    lengths: torch.Tensor  # int64 [B, C]
    old: torch.Tensor  # float32 [B, C, N]: log p of a rollout when it was sampled, else 0
    texts: list  # [B][C], None where the rewriter failed
    sources: list  # [C] of suffix, rewrite, rollout
    seconds: dict
    scores: Future | None = None  # judge.Scores


def make_pool(policy, batch: Batch, teachers, config: Config, tokenizer) -> Pool:
    """Suffix, rewrite and K rollouts of every prefix, in the order of config.candidates."""
    began, (B, N) = time.time(), batch.suffix.shape
    device = next(policy.parameters()).device
    parts = {}
    if "rewrite" in names(config.candidates):  # asked first: the rewriter works while we sample
        index = batch.index.tolist()
        rewrites = teachers.rewriter.rewrite(batch.prefix_text, batch.suffix_text, index)
    if "rollouts" in names(config.candidates):
        with autocast(config, device):
            drawn = rollout(
                policy,
                batch.prefix.to(device),
                batch.pad.to(device),
                config.rollouts,
                N,
                eos=tokenizer.eos,
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
        parts["rollouts"] = (tokens, lengths, drawn.logprobs.cpu(), texts)
    rolled = time.time()
    if "suffix" in names(config.candidates):
        full = torch.full((B, 1), N)
        parts["suffix"] = (
            batch.suffix[:, None],
            full,
            torch.zeros(B, 1, N),
            [[text] for text in batch.suffix_text],
        )
    if "rewrite" in names(config.candidates):
        tokens = torch.full((B, 1, N), tokenizer.eos)
        lengths, texts = torch.zeros(B, 1, dtype=torch.int64), [[None] for _ in range(B)]
        for b, text in enumerate(teachers.wait(rewrites)):
            if text is not None and (ids := tokenizer.encode(text)[:N]):  # cut to the chunk
                tokens[b, 0, : len(ids)] = torch.tensor(ids)
                lengths[b, 0], texts[b] = len(ids), [tokenizer.decode(ids)]
        parts["rewrite"] = (tokens, lengths, torch.zeros(B, 1, N), texts)
    chosen = [parts[name] for name in names(config.candidates)]
    tokens, lengths, old = (torch.cat([p[i] for p in chosen], dim=1) for i in range(3))
    texts = [sum((p[3][b] for p in chosen), []) for b in range(B)]
    sources = [
        s.removesuffix("s")
        for s in names(config.candidates)
        for _ in range(config.rollouts if s == "rollouts" else 1)
    ]
    seconds = {"rollout": rolled - began, "judge_wait": time.time() - rolled}
    return Pool(batch, tokens, lengths, old, texts, sources, seconds)


def ask(pool: Pool, teachers, config: Config, step: int):
    """Send a pool to the judge; the answers are awaited when the update needs them."""
    if config.rewards:
        pool.scores = teachers.judge.score(
            step,
            pool.batch.prefix_text,
            pool.batch.suffix_text,
            pool.texts,
            pool.sources,
            pool.batch.index.tolist(),
        )


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
    fields = {
        name: getattr(pool, name) for name in ("tokens", "lengths", "old", "texts", "sources")
    }
    return fields | {"batch": vars(pool.batch)}


def unpack(saved: dict) -> Pool:
    fields = {name: value for name, value in saved.items() if name != "batch"}
    return Pool(batch=Batch(**saved["batch"]), seconds={}, **fields)


def autocast(config: Config, device: torch.device):
    """float32 weights and bfloat16 arithmetic where config.dtype asks for it."""
    on = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=on)
