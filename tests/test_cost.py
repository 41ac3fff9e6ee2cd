"""What --dry_run counts is what a run does."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cost
from config import Config
from model import Llama, ModelConfig, preset
from schedules import schedule


@pytest.mark.parametrize("comparisons", ["all", "pivot", "1", "2", "5", "race", "race:0.5"])
@pytest.mark.parametrize("rollouts", [1, 4, 8, 16])
def test_comparisons_are_what_the_schedule_asks(comparisons, rollouts):
    config = Config(rollouts=rollouts, comparisons=comparisons)
    C = cost.pool_size(config)
    assert rollouts + 2 == C
    rounds, asked, outcomes = schedule(comparisons, C, 0, np.random.default_rng(0)), 0, None
    try:
        while True:
            pairs = rounds.send(outcomes)
            asked += len(pairs)
            outcomes = [1.0] * len(pairs)
    except StopIteration:
        assert asked == cost.comparisons(config)


def test_the_papers_questions():
    """256 prefixes, 16 rollouts, all pairs: 30,720 questions a step."""
    config = Config(candidates="rollouts", rollouts=16, batch_size=256, rewards="quality")
    assert cost.questions(config) == {"quality": 30720}


@pytest.mark.parametrize("name", ["world", "smollm2-135m", "llama-1.4b"])
def test_parameters(name):
    shape = preset(name, 1000)
    with torch.device("meta"):
        assert cost.parameters(shape) == sum(p.numel() for p in Llama(shape).parameters())


def test_flops_are_those_of_the_model():
    """Against torch's counter over one DPO update of a small policy, matrix products alone."""
    shape = ModelConfig(64, n_layer=2, n_head=4, n_kv_head=4, d_model=64, d_ff=128, head_dim=16)
    B, P, N = 2, 48, 16
    config = Config(batch_size=B, chunk=N, max_seq=P + N, candidates="suffix,rewrite")
    model = Llama(shape).initialise(0)
    prefix = torch.randint(64, (B, P))
    pair = torch.randint(64, (B, 2, N))
    with FlopCounterMode(display=False) as counter:
        model.logprobs(prefix, torch.zeros(B, dtype=torch.int32), pair).sum().backward()
    estimated = cost.flops(config, shape)["update"]
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.25)
