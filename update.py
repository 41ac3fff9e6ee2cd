"""One optimiser step on a pool: choose candidates, sum their losses, move the policy.

In: a Pool and its rewards. Out: a changed policy, and metrics as {name: (sum, count)}.
"""

import math

import torch
import torch.distributed as dist

from candidates import Pool, autocast
from config import Config, needs_reference
from objectives import advantages, choose, dpo_loss, grpo_loss, nll_loss
from rollout import uniforms
from support.distributed import gather
from support.shard import is_sharded, whole


def whole_documents(prefix, pad, continuation, lengths):
    """Ordinary next-token prediction in the same layout: the document's first token is the prefix
    and everything after it one continuation. Shapes as in Llama.logprobs, C = 1."""
    tokens = torch.cat((prefix, continuation[:, 0]), dim=1)  # [B, T]
    T = tokens.shape[1]
    tokens = tokens.gather(1, (torch.arange(T, device=tokens.device) + pad[:, None]) % T)
    lengths = (prefix.shape[1] - 1 - pad[:, None]) + lengths
    return tokens[:, :1], torch.zeros_like(pad), tokens[:, None, 1:], lengths


def pick(pool: Pool, reward, config: Config) -> dict:
    """What the objective learns from: rows [R] of the batch and their candidates [R, C']."""
    reward = reward.round(decimals=9)  # 0.4 + 0.8 and 0.6 + 0.6 are a tie
    u = uniforms(config.seed + 1, pool.batch.index, reward.shape[1], 1)[:, :, 0]
    chosen, rejected, keep = choose(reward, u)
    if config.objective == "dpo":
        columns = torch.stack((chosen, rejected), dim=1)
    elif config.objective == "grpo":
        columns = torch.arange(reward.shape[1]).expand(len(reward), -1)
        if config.grpo_kl:  # a group of equal rewards still has its distance to the reference
            keep = ~reward.isnan().all(dim=1)
    else:
        # NLL needs a best candidate, not a better one: a tie goes to the first named.
        best = reward.nan_to_num(-math.inf).argmax(dim=1)
        columns, keep = best[:, None], ~reward.isnan().all(dim=1)
    rows = keep.nonzero()[:, 0]
    return {"rows": rows, "columns": columns[rows], "chosen": columns[rows, 0]}


def micro_batches(rows, width: int, budget: int):
    """Slices of the rows whose token count stays within the budget (one row at least)."""
    size = max(1, budget // width)
    return [slice(i, i + size) for i in range(0, len(rows), size)]


def losses(policy, reference, pool: Pool, picked: dict, part: slice, reward, config: Config):
    """Sum of the objective over some rows and, for logging, sums of what it was made of."""
    device, temperature = next(policy.parameters()).device, config.temperature or 1.0
    rows, columns = picked["rows"][part], picked["columns"][part]
    prefix, pad = pool.batch.prefix[rows].to(device), pool.batch.pad[rows].to(device)
    # Padding common to these rows need not be computed.
    prefix, pad = prefix[:, int(pad.min()) :], pad - pad.min()
    continuations = pool.tokens[rows[:, None], columns].to(device)  # [R, C', N]
    lengths = pool.lengths[rows[:, None], columns].to(device)  # [R, C']
    layout = (prefix, pad, continuations, lengths)
    if config.nll_prefix:
        layout = whole_documents(*layout)
    anchor = None
    with autocast(config, device):
        logp = policy.logprobs(*layout, temperature)  # [R, C', N]
        if needs_reference(config):
            with torch.no_grad():
                anchor = reference.logprobs(*layout, temperature)
    if config.objective == "dpo":
        return preference(logp, anchor, lengths, config)
    if config.objective == "grpo":
        old = pool.old[rows[:, None], columns].to(device)
        gain = advantages(reward[rows], config.grpo_std).float().to(device)
        how = dict(divide_by_length=config.grpo_length, kl=config.grpo_kl, reference=anchor)
        return grpo_loss(logp, old, gain, lengths, config.grpo_clip, **how).sum(), {}
    return nll_loss(logp[:, 0], layout[3][:, 0]).sum(), {}


def preference(logp, anchor, lengths, config: Config):
    """DPO on pairs (chosen, rejected): log-probabilities of policy and reference [R, 2, N], lengths
    [R, 2] -> as `losses`."""
    policy_sum, reference_sum = logp.sum(dim=2), anchor.sum(dim=2)  # [R, 2]
    if config.length_norm:
        policy_sum, reference_sum = policy_sum / lengths, reference_sum / lengths
    loss = dpo_loss(policy_sum, reference_sum, config.beta)
    if config.nll_weight:
        loss = loss + config.nll_weight * nll_loss(logp[:, 0], lengths[:, 0]) / lengths[:, 0]
    moved = (policy_sum - reference_sum).detach()
    return loss.sum(), {
        "dpo.chosen_shift": moved[:, 0].sum(),
        "dpo.rejected_shift": moved[:, 1].sum(),
        "dpo.accuracy": (moved[:, 0] > moved[:, 1]).sum(),
    }


def idle(policy, reference, config: Config):
    """A loss of 0 that gathers what `losses` gathers: the processes of a sharded policy compute as
    many micro-batches each, whoever has the rows."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(policy.parameters()).device)
    layout = one, one[0], one[None]
    logp = policy.logprobs(*layout)
    if needs_reference(config):
        with torch.no_grad():
            reference.logprobs(*layout)
    return logp.sum() * 0


def update(policy, reference, optimizer, pool: Pool, reward, step: int, config: Config):
    """One optimiser step on the pool, over all processes. -> metrics, and what `pick` picked.

    The loss is a mean over all kept prefixes (over all tokens for nll), however many processes and
    micro-batches they are spread over; a process without any joins with zero gradients. A loss or
    gradient that is not finite leaves the policy as it was, and metrics["not_finite"] says so.
    """
    picked = pick(pool, reward, config)
    rows, C = picked["rows"], picked["columns"].shape[1]
    count = len(rows)
    if config.objective in ("nll", "rf_nll"):
        count = int(pool.lengths[rows, picked["chosen"]].sum())
        if config.nll_prefix:
            count += int((pool.batch.prefix.shape[1] - 1 - pool.batch.pad[rows]).sum())
    total = sum(gather(count))
    width = pool.batch.prefix.shape[1] + C * pool.tokens.shape[2]
    metrics = {"loss": (0.0, 0), "not_finite": (0.0, 1)}
    parts = micro_batches(rows, width, config.micro_batch_tokens)
    turns = max(gather(len(parts))) if is_sharded(policy) else len(parts)
    for turn in range(turns):
        if turn < len(parts):
            loss, extra = losses(policy, reference, pool, picked, parts[turn], reward, config)
        else:
            loss, extra = idle(policy, reference, config), {}
        (loss / max(total, 1)).backward()
        for name, value in {"loss": loss.detach(), **extra}.items():
            metrics[name] = (metrics.get(name, (0.0, 0))[0] + float(value), count)
    if total == 0:
        return metrics, picked
    if dist.is_initialized() and not is_sharded(policy):
        for p in policy.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)))
    finite = math.isfinite(metrics["loss"][0]) and math.isfinite(norm)
    if not all(gather(finite)):  # on one process: none moves
        optimizer.zero_grad(set_to_none=True)
        return metrics | {"not_finite": (1.0, 1), "grad_norm": (norm, 1)}, picked
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics["grad_norm"] = (norm, 1)
    return metrics, picked


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine to min_lr times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    low = config.min_lr
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(policy, config: Config):
    """AdamW over the parameters, spread or not; weight decay on matrices alone. `update` sets each
    step's learning rate."""
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = next(policy.parameters()).is_cuda
    return torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.95), fused=fused)
