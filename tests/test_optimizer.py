"""Muon beside the library's and beside the singular values; AdamW for all else."""

import torch

from config import Config
from model import Llama, preset
from optimizer import make_optimizer, orthogonal


def test_muon_moves_matrices_as_the_library_does_and_all_else_as_adamw():
    policy, twin, start = (Llama(preset("world", 20)).initialise(0) for _ in range(3))
    optimizers = [make_optimizer(policy, Config(optimizer="muon", learning_rate=1e-2))]
    matrices = [p for p in twin.model.layers.parameters() if p.dim() == 2]
    how = dict(lr=1e-2, weight_decay=0.1)
    optimizers += [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **how)]
    for decay, dim in ((0.1, 2), (0.0, 1)):
        rest = [p for p in twin.parameters() if p.dim() == dim]
        rest = [p for p in rest if all(p is not m for m in matrices)]
        optimizers += [torch.optim.AdamW(rest, betas=(0.9, 0.95), lr=1e-2, weight_decay=decay)]
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(policy.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(p.shape, generator=rng)
            p.grad = q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(policy.parameters(), twin.parameters(), start.parameters(), strict=True)
    for ours, theirs, before in pairs:  # theirs computes in bfloat16
        assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


def test_an_orthogonal_move_goes_equally_far_in_all_directions():
    x = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    turned = u.mT @ orthogonal(x).double() @ v.mT  # [4, 12, 12]: diagonal, of singular values
    values = turned.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-5
