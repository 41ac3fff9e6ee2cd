"""One optimiser step on a pool: choose candidates, sum their losses, move the policy.

In: a Pool and its rewards. Out: a changed policy, and what the log tells of the step.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from candidates import Pool, autocast, statistics
from config import PAIRWISE, Config, needs_reference, parse_anchor
from kernels.logprob import linear_kl, linear_logprob
from objectives import PAIR_LOSSES, advantages, choose, grpo_loss, nll_loss
from optimizer import learning_rate
from rollout import uniforms
from support.command import UserError
from support.distributed import all_sum, gather, is_sharded, rank, whole

BAD_STEPS = 5  # updates in a row that are not finite end a run


def whole_documents(prefix, pad, continuation, lengths):
    """Ordinary next-token prediction in the same layout: the document's first token is the prefix
    and everything after it one continuation. Shapes as in Llama.logprobs, C = 1."""
    tokens = torch.cat((prefix, continuation[:, 0]), dim=1)  # [B, T]
    T = tokens.shape[1]
    tokens = tokens.gather(1, (torch.arange(T, device=tokens.device) + pad[:, None]) % T)
    lengths = (prefix.shape[1] - 1 - pad[:, None]) + lengths
    return tokens[:, :1], torch.zeros_like(pad), tokens[:, None, 1:], lengths


@dataclass
class Picked:
    """What the objective learns from: R rows of a pool and C' candidates of each."""

    rows: torch.Tensor  # int64 [R], of the batch
    columns: torch.Tensor  # int64 [R, C'], of the pool; the chosen first (DPO: chosen, rejected)


def pick(pool: Pool, reward, config: Config) -> Picked:
    """The best candidate and the worst rollout of a prefix for DPO (reject=any: the worst of all),
    the best for NLL, all for GRPO.

    reward float [B, C], nan = absent. Prefixes that teach nothing (a tie, no verdict) are left out.
    """
    reward = reward.round(decimals=9)  # 0.4 + 0.8 and 0.6 + 0.6 are a tie
    u = uniforms(config.seed + 1, pool.batch.index, reward.shape[1], 1)[:, :, 0]  # [B, C]
    may_lose = torch.tensor([source == "rollout" for source in pool.sources])  # [C]
    if config.reject == "any" or not may_lose.any():
        may_lose = torch.ones_like(may_lose)
    chosen, rejected, keep = choose(reward, u, may_lose)  # [B]
    if config.objective in PAIRWISE:
        columns = torch.stack((chosen, rejected), dim=1)  # [B, 2]
    elif config.objective == "grpo":
        columns = torch.arange(reward.shape[1]).expand(len(reward), -1)  # [B, C]
        if config.grpo_kl or config.anchor:  # equal rewards, too: what holds the policy does so
            keep = ~reward.isnan().all(dim=1)
    else:
        # NLL needs a best candidate, not a better one: a tie goes to the first named.
        best = reward.nan_to_num(-math.inf).argmax(dim=1)
        columns, keep = best[:, None], ~reward.isnan().all(dim=1)  # [B, 1]
    rows = keep.nonzero()[:, 0]  # [R]
    return Picked(rows, columns[rows])


@dataclass
class Anchor:
    """What holds the policy where its documents are: the NLL of a prefix's own tokens, or the KL
    from the reference to the policy, at M tokens of each prefix. Their hidden states are computed
    anyway; M of them, and not all, keep the output layer's part as small as the continuations'."""

    kind: str  # nll or kl
    at: torch.Tensor  # int64 [R, M], positions in the prefix
    share: torch.Tensor  # float [R, M], what each counts: a row's sum is 1 (0: nothing to predict)
    targets: torch.Tensor  # int64 [R, M], the token behind each
    temperature: float
    reference: tuple = ()  # its hidden states [R * M, d] there, its output weights [V, d]
    value: torch.Tensor = torch.zeros(())  # sum over the rows of their mean NLL or KL, nats a token

    def states(self, hidden):
        """hidden [R, P, d] -> [R * M, d]."""
        return hidden.gather(1, self.at[..., None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)

    def of_reference(self, hidden, weight):
        self.reference = self.states(hidden), weight

    def of_policy(self, hidden, weight):
        states, share = self.states(hidden), self.share.flatten()
        if self.kind == "kl":
            self.value = linear_kl(states, weight, *self.reference, share, self.temperature)
        else:
            logp = linear_logprob(states, weight, self.targets.flatten(), self.temperature)
            self.value = -(logp @ share)


def make_anchor(kind: str, prefix, pad, index, M: int, seed: int, temperature: float) -> Anchor:
    """The anchor of prefixes [R, P] with pad [R], by their index [R] in the run: a token is drawn
    in each M-th of a prefix, so that in the mean all count alike."""
    P = prefix.shape[1]
    u = uniforms(seed + 2, index, 1, M)[:, 0].to(pad.device)  # [R, M]
    count = P - 1 - pad[:, None]  # [R, 1] tokens that have one behind them
    steps = (torch.arange(M, device=pad.device) + u) / M * count  # [R, M]
    at = (pad[:, None] + steps.long()).clamp(max=max(P - 2, 0))
    targets = prefix.gather(1, (at + 1).clamp(max=P - 1))
    share = (count > 0).float().expand(-1, M) / M
    return Anchor(kind, at, share, targets, temperature)


def losses(policy, reference, pool: Pool, picked: Picked, part: slice, reward, config: Config):
    """Sum of the objective over some rows and, for logging, {name: (sum, count)} of its parts."""
    device, temperature = next(policy.parameters()).device, config.temperature or 1.0
    rows, columns = picked.rows[part], picked.columns[part]  # [R], [R, C']
    prefix, pad = pool.batch.prefix[rows].to(device), pool.batch.pad[rows].to(device)  # [R, P], [R]
    # Padding common to these rows need not be computed.
    prefix, pad = prefix[:, int(pad.min()) :], pad - pad.min()
    continuations = pool.tokens[rows[:, None], columns].to(device)  # [R, C', N]
    lengths = pool.lengths[rows[:, None], columns].to(device)  # [R, C']
    layout = (prefix, pad, continuations, lengths)
    if config.nll_prefix:
        layout = whole_documents(*layout)
    ref = anchor = None
    if config.anchor:  # at as many tokens of a prefix as a candidate has
        kind, weight = parse_anchor(config.anchor)
        where = prefix, pad, pool.batch.index[rows], pool.tokens.shape[2]
        anchor = make_anchor(kind, *where, config.seed, temperature)
    with autocast(config, device):
        if needs_reference(config):
            with torch.no_grad():
                ref = reference.logprobs(*layout, temperature, anchor and anchor.of_reference)
        logp = policy.logprobs(*layout, temperature, anchor and anchor.of_policy)  # [R, C', N]
    if config.objective in PAIRWISE:
        loss, extra = preference(logp, ref, lengths, config)
    elif config.objective == "grpo":
        old = pool.old[rows[:, None], columns].to(device)  # [R, C, N]
        gain = advantages(reward[rows]).float().to(device)  # [R, C]
        held = (ref, config.grpo_kl) if config.grpo_kl else ()
        loss, extra = grpo_loss(logp, old, gain, lengths, config.grpo_clip, *held).sum(), {}
    else:
        loss, extra = nll_loss(logp[:, 0]).sum(), {}
    if anchor:
        loss, extra["anchor"] = loss + weight * anchor.value, (anchor.value.detach(), len(rows))
    # Of suffixes that the judge likes best, whether they stay likely.
    best = torch.tensor([pool.sources[column] == "suffix" for column in columns[:, 0].tolist()])
    if config.rewards and best.any() and not config.nll_prefix:
        extra["nll.suffix_chosen"] = -logp[best, 0].detach().sum(), int(lengths[best, 0].sum())
    return loss, extra


def preference(logp, ref, lengths, config: Config):
    """Pairs (chosen, rejected): log-probabilities of policy and reference [R, 2, N], lengths
    [R, 2] -> as `losses`."""
    ratio = logp.sum(dim=2) - ref.sum(dim=2)  # [R, 2]
    loss = PAIR_LOSSES[config.objective](ratio, config.beta)
    if config.nll_weight:
        loss = loss + config.nll_weight * nll_loss(logp[:, 0]) / lengths[:, 0]
    moved = ratio.detach()
    parts = {"chosen_shift": moved[:, 0], "rejected_shift": moved[:, 1]}
    parts["accuracy"] = moved[:, 0] > moved[:, 1]
    return loss.sum(), {f"dpo.{name}": (each.sum(), len(each)) for name, each in parts.items()}


def idle(policy, reference, config: Config):
    """A loss of 0 that gathers what `losses` gathers: the processes of a sharded policy compute as
    many micro-batches each, whoever has the rows."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(policy.parameters()).device)
    layout = one, one[0], one[None]
    if needs_reference(config):
        with torch.no_grad():
            reference.logprobs(*layout)
    return policy.logprobs(*layout).sum() * 0


def update(
    policy, reference, optimizer, pool: Pool, picked: Picked, reward, step: int, config: Config
) -> dict:
    """One optimiser step on what was picked, over all processes. -> {name: (sum, count)}

    The loss is a mean over all kept prefixes (over all tokens for nll), however many processes and
    micro-batches they are spread over; a process without any joins with zero gradients. A loss or
    gradient that is not finite leaves the policy as it was, and "not_finite" says so.
    """
    # Micro-batches of rows, forward and backward: gradients add up to those of the mean.
    count = count_of(pool, picked, config)
    total = sum(gather(count))
    metrics: dict[str, tuple[float, int]] = {"loss": (0.0, 0), "not_finite": (0.0, 1)}
    width = pool.batch.prefix.shape[1] + picked.columns.shape[1] * pool.tokens.shape[2]
    size = max(1, config.micro_batch_tokens // width)
    parts = [slice(i, i + size) for i in range(0, len(picked.rows), size)]
    turns = max(gather(len(parts))) if is_sharded(policy) else len(parts)
    for turn in range(turns):
        if turn < len(parts):
            loss, extra = losses(policy, reference, pool, picked, parts[turn], reward, config)
        else:
            loss, extra = idle(policy, reference, config), {}
        (loss / max(total, 1)).backward()
        metrics["loss"] = (metrics["loss"][0] + float(loss.detach()), count)
        for name, (part, n) in extra.items():
            so_far = metrics.get(name, (0.0, 0))
            metrics[name] = so_far[0] + float(part), so_far[1] + n
    if total == 0:  # no process has a row
        return metrics
    # Gradients of all processes, clipped to a norm of grad_clip.
    if dist.is_initialized() and not is_sharded(policy):
        for p in policy.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)))
    finite = math.isfinite(metrics["loss"][0]) and math.isfinite(norm)
    # The step, unless something is not finite on one process: then none moves.
    if all(gather(finite)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
    else:
        metrics["not_finite"] = (1.0, 1)
    optimizer.zero_grad(set_to_none=True)
    return metrics | {"grad_norm": (norm, 1)}


def count_of(pool: Pool, picked: Picked, config: Config) -> int:
    """What this process's loss is a mean over: rows, or the tokens of the chosen for nll."""
    if config.objective not in ("nll", "rf_nll"):
        return len(picked.rows)
    count = int(pool.lengths[picked.rows, picked.columns[:, 0]].sum())
    if config.nll_prefix:
        count += int((pool.batch.prefix.shape[1] - 1 - pool.batch.pad[picked.rows]).sum())
    return count


def describe(step: int, pool: Pool, scores, picked: Picked, metrics: dict, config: Config) -> dict:
    """The step's line of log.jsonl, over all processes: metrics, who was chosen, the pool."""
    means = dict(metrics)
    means["skipped"] = (len(pool.lengths) - len(picked.rows), 0)
    chosen = [pool.sources[column] for column in picked.columns[:, 0].tolist()]
    for source in sorted(set(pool.sources)):
        means[f"chosen.{source}"] = (chosen.count(source), len(chosen))
    means |= statistics(pool, scores, judged=bool(config.rewards))
    line = {"step": step, "lr": learning_rate(step, config)}
    for name, (total, count) in all_sum(means).items():
        empty = math.nan if name.startswith(("reward", "loss")) else total  # no row is no loss
        line[name] = total / count if count else empty
    return line


def keep_bad_batch(run: Path, step: int, bad: int, pool: dict, reward, picked: Picked):
    """Save what an update that was not finite learned from; UserError at the BAD_STEPS-th in a row.

    bad: how many there were in a row; pool: packed."""
    folder = run / "bad_batches"
    folder.mkdir(exist_ok=True)
    kept = {"step": step, "pool": pool, "reward": reward, "picked": vars(picked)}
    torch.save(kept, folder / f"step_{step:06d}_process_{rank()}.pt")
    if bad == BAD_STEPS:
        raise UserError(
            f"{bad} updates in a row were not finite and were skipped, the last is step {step}: see"
            f" {folder}. Go on with --init_from=resume and a lower --learning_rate (in the base "
            "--base_learning_rate), if the weights are ruined with the newest checkpoint moved away"
        )
