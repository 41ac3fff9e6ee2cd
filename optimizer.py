"""How gradients move a policy: AdamW, or Muon beside it, and the learning rate of a step.

In: parameters with gradients, spread over processes or not. Out: the same, moved; the state of an
optimiser, a tensor or two for each parameter. update.py sets each step's learning rate.
"""

import math

import torch

from config import Config
from support.distributed import spread_as, whole


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have a `momentum`, AdamW for the others.

    A matrix moves by its momentum made orthogonal, equally far in all of its directions. 0.2 times
    the root of the longer side makes that as long as a step of AdamW (Liu et al. 2025, arXiv
    2502.16982, equation 4), so one learning rate is right for both.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "momentum" in group:
                self.move(group)
        super().step()

    def move(self, group: dict):
        """One step of a group's matrices; those of one shape at once."""
        alike: dict[tuple, list] = {}
        for p in group["params"]:
            alike.setdefault(tuple(p.shape), []).append(p)
        for (rows, columns), params in alike.items():
            moves = orthogonal(torch.stack([self.direction(p, group["momentum"]) for p in params]))
            length = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            for p, move in zip(params, moves, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(spread_as(p, length * move))
                p.grad = None  # so that AdamW leaves it alone

    def direction(self, p, momentum: float):
        """Nesterov's momentum of a matrix, in one piece: [rows, columns]."""
        if not (state := self.state[p]):  # AdamW looks for a step in every one
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
        average = state["momentum"].lerp_(p.grad, 1 - momentum)
        return whole(p.grad.lerp(average, momentum), p.device)


def orthogonal(x):
    """x [n, r, c] -> nearly U V' of each x = U S V': its singular values, whatever they were, come
    to lie around 1 (0.7 to 1.2), by five Newton-Schulz steps (Jordan et al. 2024)."""
    if x.shape[1] > x.shape[2]:  # the smaller Gram matrix costs less
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # [n, r, r]
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


def make_optimizer(policy, config: Config):
    """Over all parameters, spread or not; weight decay on matrices alone."""
    layers, matrices, vectors = [], [], []
    for name, p in policy.named_parameters():
        within = ".layers." in name and config.optimizer == "muon"
        (vectors if p.dim() == 1 else layers if within else matrices).append(p)
    groups: list[dict] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if layers:
        groups.append({"params": layers, "momentum": 0.95})
    how: dict = dict(betas=(0.9, 0.95), weight_decay=config.weight_decay)
    how["fused"] = next(policy.parameters()).is_cuda
    return (Muon if layers else torch.optim.AdamW)(groups, config.learning_rate, **how)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine to min_lr times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    low = config.min_lr
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
