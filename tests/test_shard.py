"""A policy spread over two processes (FSDP2) learns what one process learns."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule

from candidates import Pool
from config import Config
from data import Batch
from model import Llama, ModelConfig, in_one_piece
from optimizer import make_optimizer
from support.distributed import choose_threads, is_sharded, load_optimizer, shard, whole
from update import pick, update

SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, head_dim=8)
SHAPE = ModelConfig(40, **SIZES, tie_embeddings=True)
# What the families have beside, all at once.
OTHER = replace(SHAPE, qkv_bias=True, qk_norm="whole", norm_after=True, rotates=[1, 0])
GRPO = dict(objective="grpo", grpo_kl=0.1, optimizer="muon")


def pool(rows: list):
    """Some of three prefixes with four candidates each, and their rewards."""
    rng, rows = torch.Generator().manual_seed(0), torch.tensor(rows, dtype=torch.int64)
    prefix = torch.randint(40, (3, 9), generator=rng)[rows]
    tokens = torch.randint(40, (3, 4, 5), generator=rng)[rows]
    reward, n = torch.rand(3, 4, generator=rng).double()[rows], len(rows)
    pad = torch.zeros(n, dtype=torch.int32)
    batch = Batch(prefix, pad, tokens[:, 0], rows, [""] * n, [""] * n, {})
    lengths, old = torch.full((n, 4), 5), torch.zeros(n, 4, 5)
    return Pool(batch, tokens, lengths, old, [], ["rollout"] * 4), reward


def learn(policy, reference, turns: list, **settings):
    """An update for each list of rows, with the optimiser saved and loaded in between."""
    how = dict(micro_batch_tokens=20, max_steps=4, warmup_steps=1, learning_rate=1e-2)
    config = Config(**how, **settings)
    state, norms = None, []
    for step, rows in enumerate(turns):
        optimizer = make_optimizer(policy, config)
        for group in optimizer.param_groups:  # else gradients of rounding's size move weights
            group["eps"] = 1e-3
        if state is not None:
            load_optimizer(optimizer, state)
        candidates, reward = pool(rows)
        picked = pick(candidates, reward, config)
        metrics = update(policy, reference, optimizer, candidates, picked, reward, step, config)
        state = whole(optimizer.state_dict())
        norms.append(metrics["grad_norm"][0])
        in_one_piece(policy)  # as sampling does, between updates
    weights = {name: p.detach() for name, p in in_one_piece(policy).named_parameters()}
    return weights, state["state"], norms


def models(shape=SHAPE):
    return Llama(shape).initialise(0), Llama(shape).initialise(1)


def process(rank: int, folder: str):
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    both = [shard(model, torch.device("cpu")) for model in (*models(), *models(OTHER))]
    policy, reference, *others = both
    assert is_sharded(policy)
    policy.recompute = True
    # Remainders, and a process that has no row at all: one, then the other.
    turns = [[0, 1, 2], [0], []] if rank == 0 else [[], [1, 2], [1]]
    result = learn(policy, reference, turns, anchor="kl:0.5")
    grpo = learn(*others, [[0, 1, 2] if rank == 0 else []], **GRPO)
    if rank == 0:
        torch.save((result, grpo), f"{folder}/result")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"), reason="needs a newer PyTorch"
)
def test_two_processes_equal_one(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    dpo = learn(*models(), [[0, 1, 2], [0, 1, 2], [1]], anchor="kl:0.5")
    grpo = learn(*models(OTHER), [[0, 1, 2]], **GRPO)
    for spread, one in zip(torch.load(tmp_path / "result"), (dpo, grpo), strict=True):
        for found, expected in zip(spread[0].items(), one[0].items(), strict=True):
            assert found[0] == expected[0] and torch.allclose(found[1], expected[1], atol=1e-5)
        for i, moments in one[1].items():
            for name, value in moments.items():
                assert torch.allclose(spread[1][i][name], value, atol=1e-5)
        assert torch.allclose(torch.tensor(spread[2]), torch.tensor(one[2]), atol=1e-5)


def test_a_resumed_run_has_the_settings_that_it_was_given():
    policy, before = Llama(SHAPE).initialise(0), Config(weight_decay=0.1)
    state = make_optimizer(policy, before).state_dict()
    optimizer = make_optimizer(policy, Config(weight_decay=0.3))
    load_optimizer(optimizer, state)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(
    ("width", "files", "threads"),
    [
        (96, {}, 1),
        (576, {}, 3),
        (576, {"cpu.max": "200000 100000"}, 2),  # two of the machine's three
        (576, {"cpu.max": "50000 100000"}, 1),
        (576, {"cpu.max": "max 100000"}, 3),
        (576, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (576, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_threads_are_those_that_help_and_are_there(tmp_path, monkeypatch, width, files, threads):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    now = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert choose_threads(width, tmp_path) == 3  # the user's word
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert choose_threads(width, tmp_path) == threads
    finally:
        torch.set_num_threads(now)
