"""The objectives against values worked out by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from config import Config, differences, parse
from objectives import advantages, choose, dpo_loss, dpop_loss, grpo_loss, ipo_loss
from update import pick

NAN = float("nan")


def test_choose_takes_best_and_worst_and_skips_ties():
    reward = torch.tensor(
        [
            [0.2, 0.9, 0.5],
            [0.5, 0.5, 0.5],  # a tie is no preference
            [NAN, 0.1, 0.3],  # the absent candidate is neither
            [NAN, NAN, 0.7],  # nothing to compare with
            [NAN, NAN, NAN],
            [1.0, 0.0, 1.0],  # equals: u decides
        ]
    )
    u = torch.tensor([[0.1, 0.2, 0.3]]).expand(6, 3).clone()
    anybody = torch.ones(3, dtype=torch.bool)
    chosen, rejected, keep = choose(reward, u, anybody)
    assert keep.tolist() == [True, False, True, False, False, True]
    assert chosen[keep].tolist() == [1, 2, 2] and rejected[keep].tolist() == [0, 1, 1]
    u[5] = torch.tensor([0.9, 0.2, 0.3])
    assert choose(reward, u, anybody)[0][5] == 0


def test_sums_that_differ_by_rounding_alone_are_a_tie():
    """Quality 0.4 + safety 0.8 and 0.6 + 0.6, as five samples of two candidates may give."""
    reward = torch.tensor([[0.4 + 0.8, 0.6 + 0.6], [0.4 + 0.8, 0.8 + 0.6]], dtype=torch.float64)
    assert reward[0, 0] != reward[0, 1]
    pool = SimpleNamespace(batch=SimpleNamespace(index=torch.arange(2)), sources=["rollout"] * 2)
    assert pick(pool, reward, Config()).rows.tolist() == [1]
    grpo = dict(objective="grpo", candidates="rollouts")
    assert pick(pool, reward, Config(**grpo)).rows.tolist() == [1]
    for held in (dict(grpo_kl=0.1), dict(anchor="nll:1")):  # equal rewards, and still held
        assert pick(pool, reward, Config(**grpo, **held)).rows.tolist() == [0, 1]
    first = pick(pool, reward.flip(1), Config(objective="rf_nll"))  # of equals, the first named
    assert first.columns[:, 0].tolist() == [0, 0]


def test_dpo_by_hand():
    """Ratios (-10 + 12) = 2 and (-20 + 18) = -2, beta 0.5: -log sigmoid(2) = 0.126928. At the
    reference the loss is log 2 and its gradient -beta/2 and +beta/2."""
    ratio = torch.tensor([[-10.0, -20.0]]) - torch.tensor([[-12.0, -18.0]])
    loss = dpo_loss(ratio, beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert ipo_loss(ratio, beta=0.5).item() == pytest.approx((4 - 1) ** 2)
    # The chosen has become likelier: nothing is added; a nat less likely costs 50 in the margin.
    assert dpop_loss(ratio, beta=0.5).item() == pytest.approx(loss.item())
    fallen = dpop_loss(torch.tensor([[-1.0, -2.0]]), beta=0.5)
    assert fallen.item() == pytest.approx(math.log(1 + math.exp(-0.5 * (1 - 50))))
    policy = torch.tensor([[-3.0, -5.0]], requires_grad=True)
    loss = dpo_loss(policy - policy.detach(), beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert policy.grad.tolist() == [[pytest.approx(-0.05), pytest.approx(0.05)]]


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, NAN, 1.0, NAN]])
    expected = torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0], [1, 0, -1, 0]])
    assert torch.allclose(advantages(reward), expected, atol=1e-4)


def test_grpo_by_hand():
    """Two rollouts of lengths 2 and 1; ratios 1.5 (clipped to 1.2) and 0.5 (kept, since worse)."""
    old = torch.zeros(1, 2, 2)
    logp = torch.tensor([[[math.log(1.5), 0.0], [math.log(0.5), 9.0]]], requires_grad=True)
    advantage, lengths = torch.tensor([[1.0, -1.0]]), torch.tensor([[2, 1]])
    loss = grpo_loss(logp, old, advantage, lengths, clip=0.2)
    # ((1.2 + 1) / 2 - max(0.5, 0.8)) / 2, negated
    assert loss.item() == pytest.approx(-((1.2 + 1.0) / 2 - 0.8) / 2, abs=1e-6)
    loss.sum().backward()
    # clipped ratios have no gradient, nor has what lies beyond the length
    assert logp.grad.flatten().tolist() == pytest.approx([0.0, -1 / 4, 0.0, 0.0])


def test_grpo_kl_by_hand():
    """Reference twice as likely: exp(log 2) - log 2 - 1 is charged; its gradient is 1 - 2."""
    logp = torch.full((1, 1, 1), math.log(0.25), requires_grad=True)
    one, reference = torch.ones(1, 1), torch.full((1, 1, 1), math.log(0.5))
    none = torch.zeros(1, 1)
    loss = grpo_loss(logp, logp.detach(), none, one, 0.2, reference=reference, kl=0.1)
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)), abs=1e-6)
    loss.sum().backward()
    assert logp.grad.item() == pytest.approx(0.1 * (1 - 2), abs=1e-6)


def test_a_run_of_an_older_version_keeps_what_it_did(tmp_path):
    """Its config.json has no `reject`: everybody could be rejected, as the paper has it."""
    saved = {k: v for k, v in vars(Config(out_dir=str(tmp_path))).items() if k != "reject"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert differences(Config(), tmp_path / "config.json") == ["reject ('any', now 'rollouts')"]
    resumed, resume = parse(["--init_from=resume", f"--out_dir={tmp_path}"])
    assert resume and resumed.reject == "any"
    pool = SimpleNamespace(batch=SimpleNamespace(index=torch.arange(1)), sources=["suffix"] * 2)
    reward = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert pick(pool, reward, Config()).columns.tolist() == [[1, 0]]  # no rollout: anybody may lose
