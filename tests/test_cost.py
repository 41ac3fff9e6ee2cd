"""What --dry_run counts is what a run does."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from candidates import Pool
from config import REWARDS, Config
from data import Batch
from model import Llama, ModelConfig
from optimizer import make_optimizer
from rollout import sample_rollouts
from tools import cost
from update import pick, update


def test_questions_and_tokens_follow_from_the_config_and_the_prompts(tmp_path):
    """The paper's 30,720 questions a step; a prompt of one's own costs what it shows."""
    config = Config(candidates="rollouts", rollouts=16, batch_size=256, rewards="quality")
    assert cost.questions(config) == {"quality": 256 * 120}
    assert cost.questions(replace(config, comparisons="race")) == {"quality": 256 * 30}
    (tmp_path / "safety.txt").write_text("x" * 32 + "<{mark}>{text}")
    config = Config(rewards="safety", candidates="suffix", rollouts=1, prompts=str(tmp_path))
    assert cost.tokens(config) == (32 * (46 // 4 + config.chunk), 32 * cost.ANSWER_TOKENS)
    whole = Config(rewards=",".join(REWARDS))  # any reward that config.py knows
    assert set(cost.questions(whole)) == {*REWARDS, "rewrite"} and all(cost.tokens(whole))


# Narrow heads: attention, whose products the counter does not see, is a hundredth of the work.
SHAPE = ModelConfig(2048, n_layer=2, n_head=2, n_kv_head=1, d_model=128, d_ff=352, head_dim=16)
FEW = dict(batch_size=3, chunk=8, max_seq=56, rollouts=4, candidates="rollouts", dtype="float32")
OBJECTIVES = [
    dict(objective="dpo"),
    *(dict(objective="dpo", anchor=anchor) for anchor in ("nll:1", "kl:1")),
    dict(objective="ipo", recompute=True),
    dict(objective="rf_nll"),
    dict(objective="nll", rewards="", nll_prefix=True),
    dict(objective="grpo"),
    dict(objective="grpo", grpo_kl=0.1),
]


def counted(run) -> int:
    """FLOPs of the products with weights that run() does."""
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, out_shape: mm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as found:
        run()
    return found.get_total_flops()


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_flops_are_those_of_a_step(changes):
    """Of the update, and of the sampler, whose rollouts here never end before their limit."""
    config, shape = Config(**FEW, **changes), replace(SHAPE, tie_embeddings="recompute" in changes)
    policy, reference = (Llama(shape).initialise(seed) for seed in (0, 1))
    policy.recompute = config.recompute
    B, P, N, C = 3, 48, 8, cost.pool_size(config)
    prefix, tokens = torch.randint(2048, (B, P)), torch.randint(2048, (B, C, N))
    pad, index = torch.zeros(B, dtype=torch.int32), torch.arange(B)
    batch = Batch(prefix, pad, tokens[:, 0], index, [], [], {})
    old = torch.full((B, C, N), -math.log(2048))
    pool = Pool(batch, tokens, torch.full((B, C), N), old, [], ["rollout"] * C)
    optimizer, reward = make_optimizer(policy, config), torch.rand(B, C, dtype=torch.float64)
    step = (pool, pick(pool, reward, config), reward, 0, config)
    done = counted(lambda: update(policy, reference, optimizer, *step))
    estimated = cost.flops(config, shape)
    how = dict(eos=-1, seed=0, index=index)
    sampled = counted(lambda: sample_rollouts(policy, prefix, pad, 4, N, **how))
    assert estimated.pop("rollouts") == pytest.approx(sampled, rel=0.05)
    # Of a layer that is computed again torch leaves out the last product, which nothing needs.
    off = 0.1 if config.recompute else 0.05
    assert sum(estimated.values()) == pytest.approx(done, rel=off)


def test_memory_holds_what_training_keeps():
    """The initial policy always, the baseline until the evaluation; of a step's 8 prefixes of 64
    tokens a process's 4, rollouts of 32, and a pair of them learned from."""
    count, layer = cost.parameters(SHAPE), (16 * 128 + 4 * 352) * 3.4  # bytes of a token
    base, baseline = "initial policy (the reference)", "next-token baseline, for the evaluation"
    held = cost.memory(Config(objective="rf_nll"), SHAPE, bf16=True)
    assert held["weights, gradients, optimiser"] == 16 * count
    assert held[base] == held[baseline] == 4 * count  # float32 in bfloat16 runs too
    assert held["their copies in bfloat16"] == 2 * count  # rf_nll asks no reference
    spread = cost.memory(Config(shard=True, gpus=8), SHAPE, bf16=False)
    assert spread["weights, gradients, optimiser"] == 2 * count and spread[base] == count / 2
    assert spread["whole weights while sampling"] == 4 * count and baseline not in spread
    for budget, rows in ((65536, 4), (300, 2)):
        size = dict(batch_size=8, gpus=2, chunk=32, max_seq=96, micro_batch_tokens=budget)
        held = cost.memory(Config(**size), SHAPE, bf16=True)
        cache, learning = 4 * (64 + 4 * 32) * 2 * 2 * 1 * 16 * 2, rows * (64 + 2 * 32) * 2 * layer
        assert held["cache of prefixes and rollouts"] == cache
        assert held["activations of a micro-batch"] == pytest.approx(learning)
        # sampling and learning take turns: the larger counts
        assert held["most at once"] == pytest.approx((16 + 3 * 4) * count + max(learning, cache))
