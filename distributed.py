"""The processes of a torchrun: who we are, and sums over everybody. One process needs nothing."""

import os

import torch
import torch.distributed as dist

from config import ConfigError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(pairs: dict) -> dict:
    """{name: (sum, count)} added up over all processes, which must name the same things."""
    if not dist.is_initialized():
        return pairs
    everyone = gather(pairs)
    keys = dict.fromkeys(key for each in everyone for key in each)
    return {
        key: tuple(map(sum, zip(*(each.get(key, (0, 0)) for each in everyone), strict=True)))
        for key in keys
    }


def gather(value) -> list:
    """The value of every process, on all of them."""
    if not dist.is_initialized():
        return [value]
    out = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def agreed(work):
    """work() on every process; what it raises on one of them is raised on all, so that none is left
    waiting for the others."""
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    for each in gather(error):
        if each is not None:
            raise each
    return result


def start(kind: str) -> torch.device:
    """Join the other processes, if torchrun started any; "auto" is CUDA where there is one."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(kind.partition(":")[0], True):
        raise ConfigError(f"device={kind}: PyTorch finds none here; set device=auto")
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(kind)
