"""What a run will cost, before it starts: python train.py ... --dry_run

In: a config, the policy's shape, the prompts. Out: questions and tokens for the teachers, FLOPs,
memory of one GPU, hours and money at the throughput and price that the config states. Counts are
exact where they follow from the config (questions, positions computed); a question's tokens are its
prompt's characters / 4 plus the texts that it shows at full length, an answer is ANSWER_TOKENS, and
activations are 16 numbers of width d and 4 of width d_ff per token and layer in bfloat16, on a CPU
in float32 those that are kept there, the logits' chunk aside.
"""

from contextlib import suppress

import numpy as np
import torch

from config import PAIRWISE, Config, needs_reference, parse_rewards, pool_size
from judge import FIELD, load_prompts
from model import Llama, ModelConfig, preset, read_config
from schedules import schedule
from support.settings import names
from support.tokenizer import load_tokenizer

ANSWER_TOKENS = 80  # a short reasoning and a verdict


def comparisons(config: Config) -> int:
    """Quality questions about one prefix, samples aside: what the schedule asks for."""
    plan, asked = schedule(config.comparisons, pool_size(config), 0, np.random.default_rng(0)), 0
    with suppress(StopIteration):
        pairs = next(plan)
        while True:
            asked += len(pairs)
            pairs = plan.send([1.0] * len(pairs))
    return asked


def questions(config: Config) -> dict[str, int]:
    """Questions a step by kind; malformed answers, asked again, come on top."""
    B, C, out = config.batch_size, pool_size(config), {}
    for kind in parse_rewards(config.rewards):
        each = comparisons(config) if kind == "quality" else C  # the one that is judged in pairs
        out[kind] = B * each * config.judge_samples
    return out | ({"rewrite": B} if "rewrite" in names(config.candidates) else {})


def tokens(config: Config) -> tuple[int, int]:
    """Teacher tokens a step: (read, written)."""
    N, P = config.chunk, config.max_seq - config.chunk
    lengths = {"prefix": P, "mark": 0, "last_words": 0}  # of what a prompt shows; else N
    read, written, templates = 0, 0, load_prompts(config.prompts)
    for kind, count in questions(config).items():
        shown = set(FIELD.findall(templates[kind]))
        read += count * (len(templates[kind]) // 4 + sum(lengths.get(name, N) for name in shown))
        written += count * (N if kind == "rewrite" else ANSWER_TOKENS)
    return read, written


def parameters(shape: ModelConfig) -> int:
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in Llama(shape).parameters())


def learned(config: Config) -> int:
    """Candidates of each prefix whose log-probabilities the objective needs."""
    if config.objective in PAIRWISE:
        return 2
    return pool_size(config) if config.objective == "grpo" else 1


def flops(config: Config, shape: ModelConfig) -> dict[str, float]:
    """FLOPs a step: 2 per weight and token forward, 4 backward, and what the backward pass computes
    again (the logits; with recompute=True the layers); attention's own on top. The output layer
    runs on the predicting tokens alone."""
    B, N, P, K = config.batch_size, config.chunk, config.max_seq - config.chunk, config.rollouts
    output = 2 * shape.vocab_size * shape.d_model
    weights = 2 * parameters(shape) - output * (1 if shape.tie_embeddings else 2)
    per_key = 4 * shape.n_layer * shape.n_head * shape.head_dim

    def layers(continuations: int) -> float:
        """Of a prefix and its continuations, whose last token predicts nothing and is not fed."""
        fed = continuations * (N - 1)
        return weights * (P + fed) + per_key * (P * P / 2 + fed * (P + N / 2))

    C, kl = learned(config), config.anchor.startswith("kl")
    hidden = layers(C)
    logits = output * (P + N - 1 if config.nll_prefix else C * N)
    anchor = output * N if config.anchor else 0  # the KL has its logits at hand backward
    update = (4 if config.recompute else 3) * hidden + 4 * logits + (3 if kl else 4) * anchor
    out = {"update": B * update}
    if needs_reference(config):
        out["reference"] = B * (hidden + logits + kl * anchor)
    if "rollouts" in names(config.candidates):
        out["rollouts"] = B * (layers(K) + output * (1 + K * (N - 1)))
    return out


def memory(config: Config, shape: ModelConfig, bf16: bool) -> dict[str, float]:
    """Bytes on one GPU, or of a process on a CPU (bf16 False): float32 weights, gradients, Adam's
    two moments; the other policies that stay beside them; activations of one micro-batch, or the
    sampler's cache for this process's prefixes: one after the other, so that the larger counts.
    shard=True spreads the first two, keeps the baseline in the computer's memory and samples from
    a whole copy of the weights."""
    size, count, sampled = (2 if bf16 else 4), parameters(shape), "rollouts" in config.candidates
    output = 4 * shape.vocab_size * shape.d_model
    N, P = config.chunk, config.max_seq - config.chunk
    C = learned(config)
    row, prefixes = P + C * N, -(-config.batch_size // config.gpus)
    rows = min(prefixes, max(1, config.micro_batch_tokens // row))
    if bf16:  # autocast keeps the residual stream in float32: measured, an H200
        kept, per_layer, weights = 3.4, (16 * shape.d_model + 4 * shape.d_ff) * 3.4, 0
    else:  # kernels/lean.py, and a layer's weights of several continuations' attention
        heads = (3 * shape.n_head + 2 * shape.n_kv_head) * shape.head_dim
        kept, per_layer = 4, 4 * (2 * shape.d_model + heads + 2 * shape.d_ff)
        weights = 4 * shape.n_head * C * N * (P + N) * (C > 1)
    layers, inputs = shape.n_layer, 0
    if config.recompute:  # the input of every layer, and one layer in full
        layers, inputs = 1, shape.n_layer * shape.d_model * kept
    activations = rows * (row * (inputs + layers * per_layer) + weights)
    cache = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * size  # a token
    spread = config.shard and config.gpus > 1
    share = config.gpus if spread else 1
    copies = 2 if needs_reference(config) else 1
    out = {
        "weights, gradients, optimiser": 16 * count / share,
        "initial policy (the reference)": 4 * count / share,
        "next-token baseline, for the evaluation": 4 * count * (config.baseline and not spread),
        # autocast keeps them for the length of a forward pass
        "their copies in bfloat16": 2 * count * copies * (bf16 and not spread),
    }
    learning = {
        "activations of a micro-batch": activations,
        "what its backward pass computes again": rows * row * 8 * shape.d_ff * (not bf16),
        "the anchor's gradient of the output layer": output * config.anchor.startswith("kl"),
    }
    sampling = {
        "whole weights while sampling": 4 * count * (spread and sampled),
        "cache of prefixes and rollouts": prefixes * cache * (P + config.rollouts * N) * sampled,
    }
    most = max(sum(phase.values()) for phase in (learning, sampling))
    out |= learning | sampling | {"most at once": sum(out.values()) + most}
    return {name: float(held) for name, held in out.items() if held}


def estimate(config: Config, shape: ModelConfig, bf16: bool) -> str:
    """The page that --dry_run prints."""
    asked, (read, written), total = questions(config), tokens(config), config.max_steps
    work, held = flops(config, shape), memory(config, shape, bf16)
    judge_seconds = (read / 10 + written) / config.judge_tokens_per_second
    policy_seconds = sum(work.values()) / (config.gpus * config.gpu_tflops * 1e12)
    step = (max if config.overlap else sum)((policy_seconds, judge_seconds))
    price = total * (read * config.price_in + written * config.price_out) / 1e6
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in asked.items())
    page = [
        f"{parameters(shape) / 1e6:,.1f}M parameters, {config.batch_size} prefixes a step, "
        f"{pool_size(config)} candidates each, {total:,} steps",
        f"questions a step: {sum(asked.values()):,} ({kinds}), "
        f"{total * sum(asked.values()):,} in all",
        f"teacher tokens a step: {read:,} read, {written:,} written, "
        f"{total * (read + written) / 1e9:,.2f} billion in all",
        "policy, a step",
        *(f"  {name:<40} {value / 1e12:>14,.2f} TFLOP" for name, value in work.items()),
        "memory of one GPU",
        *(f"  {name:<40} {value / 1e9:>14,.2f} GB" for name, value in held.items()),
        f"seconds a step: policy {policy_seconds:,.2f} ({config.gpus} GPUs at "
        f"{config.gpu_tflops:g} TFLOP/s), judge {judge_seconds:,.2f} (writing "
        f"{config.judge_tokens_per_second:,.0f} tokens/s, reading ten times that), "
        f"together {step:,.2f} with overlap={config.overlap}; {total * step / 3600:,.1f} hours",
        f"price {price:,.0f} at {config.price_in:g} / {config.price_out:g} a million tokens read / "
        "written",
    ]
    return "\n".join(page if price else page[:-1])


def dry_run(config: Config) -> str:
    """The estimate for a config, whose policy need not be there yet."""
    if config.init_from != "scratch":
        shape = read_config(config.init_from)
    else:  # without a tokenizer of its own, the size of Llama's
        own = "world" if config.data == "world" else ""
        name = own if config.tokenizer == "auto" else config.tokenizer
        shape = preset(config.model, load_tokenizer(name).vocab_size if name else 32000)
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and torch.cuda.is_available())
    return estimate(config, shape, bf16=bf16)
