"""The anchor on the prefix, and who may be rejected, against plain definitions."""

import pytest
import torch

from candidates import Pool
from config import Config
from data import Batch
from kernels.logprob import linear_kl
from model import Llama, ModelConfig
from objectives import choose
from update import Picked, losses, make_anchor

SHAPE = ModelConfig(40, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, head_dim=8)
NAN = float("nan")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_kl_is_its_definition(temperature):
    draw = torch.Generator().manual_seed(0)
    shapes = (70, 12), (50, 12), (70, 6), (50, 6), (70,)
    how = dict(generator=draw, dtype=torch.float64, requires_grad=True)
    hidden, weight, other, other_weight, scale = (torch.randn(shape, **how) for shape in shapes)
    logp = (hidden @ weight.T / temperature).log_softmax(1)
    logq = (other @ other_weight.T / temperature).log_softmax(1).detach()
    plain = (scale.detach() * (logq.exp() * (logq - logp)).sum(1)).sum()
    ours = linear_kl(hidden, weight, other, other_weight, scale.detach(), temperature)
    assert torch.allclose(ours, plain)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    found = torch.autograd.grad(3 * ours, (hidden, weight))
    assert all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))


def pool_of(P: int, N: int) -> Pool:
    draw = torch.Generator().manual_seed(1)
    prefix = torch.randint(40, (3, P), generator=draw)
    tokens = torch.randint(40, (3, 2, N), generator=draw)
    pad = torch.tensor([0, 2, P - 1], dtype=torch.int32)  # the last has nothing to predict
    batch = Batch(prefix, pad, tokens[:, 0], torch.arange(3), [""] * 3, [""] * 3, {})
    full = torch.full((3, 2), N)
    return Pool(batch, tokens, full, torch.zeros(3, 2, N), [], ["suffix", "rollout"])


@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_anchor_adds_the_mean_over_the_prefix(kind, recompute):
    """With P - 1 = M every token is drawn once where there is no padding, so nothing is random but
    the row with padding, whose tokens `make_anchor` says."""
    P, N, weight = 7, 6, 0.3
    pool, reward = pool_of(P, N), torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    picked = Picked(torch.arange(3), torch.tensor([[0, 1]] * 3))
    policy, reference = Llama(SHAPE).initialise(0), Llama(SHAPE).initialise(1)
    policy.recompute = recompute

    def gradients(loss):
        return [g.clone() for g in torch.autograd.grad(loss, list(policy.parameters()))]

    inputs = policy, reference, pool, picked, slice(0, 3), reward
    without, _ = losses(*inputs, Config(beta=0.5))
    with_it, extra = losses(*inputs, Config(beta=0.5, anchor=f"{kind}:{weight}"))
    prefix, pad = pool.batch.prefix, pool.batch.pad
    anchor = make_anchor(kind, prefix, pad, pool.batch.index, N, 0, 1.0)
    assert sorted(anchor.at[0].tolist()) == list(range(P - 1)) and (anchor.at[1] >= 2).all()
    logp = (policy.lm_head(policy(prefix, pad, P, 0))).log_softmax(2)  # [3, P, V]
    logq = (reference.lm_head(reference(prefix, pad, P, 0))).log_softmax(2).detach()
    each = (logq.exp() * (logq - logp)).sum(2)  # [3, P]
    if kind == "nll":
        each = -logp[:, :-1].gather(2, prefix[:, 1:, None])[:, :, 0]  # [3, P - 1]
    plain = each[:2].gather(1, anchor.at[:2]).mean(dim=1).sum()
    assert torch.allclose(extra["anchor"][0], plain, atol=1e-5) and extra["anchor"][1] == 3
    surprise, count = extra["nll.suffix_chosen"]  # all three suffixes are
    chosen = policy.logprobs(prefix, pad, pool.tokens[:, :1]).sum()
    assert torch.allclose(surprise, -chosen, atol=1e-4) and count == 3 * N
    found, expected = gradients(with_it - without), gradients(weight * plain)
    for pair in zip(found, expected, strict=True):
        assert torch.allclose(*pair, atol=1e-5)


def test_every_token_of_a_prefix_counts_alike():
    prefix, pad = torch.zeros(20_000, 9, dtype=torch.int64), torch.full((20_000,), 2)
    at = make_anchor("nll", prefix, pad, torch.arange(20_000), 4, 0, 1.0).at
    counts = torch.bincount(at.flatten(), minlength=9) / 20_000
    assert counts[[0, 1, 8]].tolist() == [0, 0, 0]  # padding, and the last, which predicts none
    assert torch.allclose(counts[2:8], torch.full((6,), 4 / 6), atol=0.02)


def test_only_rollouts_may_be_rejected():
    reward = torch.tensor(
        [
            [0.0, 0.5, 0.4, 0.9],  # the suffix is worst, and spared
            [0.9, 0.0, 0.9, NAN],  # the only other rollout has the best reward, too
            [0.9, 0.0, NAN, NAN],  # no rollout has a verdict
            [0.9, 0.0, NAN, 0.2],
        ]
    )
    may_lose = torch.tensor([False, False, True, True])
    chosen, rejected, keep = choose(reward, torch.rand(4, 4), may_lose)
    assert keep.tolist() == [True, False, False, True]
    assert chosen[keep].tolist() == [3, 0] and rejected[keep].tolist() == [2, 3]
