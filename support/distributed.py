"""The processes of a torchrun: who we are, and sums over everybody. One process needs nothing."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from support.command import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(pairs: dict) -> dict:
    """{name: (sum, count)} added up over all processes that name it."""
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
    everyone = gather(error)
    if error is not None:
        raise error  # rather than its copy, which has lost its traceback
    for each in everyone:
        if each is not None:
            raise each
    return result


def start(kind: str, patience: float) -> torch.device:
    """Join the other processes, if torchrun started any; "auto" is CUDA where there is one.

    patience: seconds that a process may wait for its teachers before it gives up; the others stand
    in a collective operation meanwhile, which must not time out before.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(kind)
    except RuntimeError as e:
        raise UserError(f"device={kind}: {e}") from None
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(device.type, True):
        raise UserError(f"device={kind}: PyTorch finds none here; set device=auto")
    several = "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if device.type == "cuda":
        if several and device.index is not None:
            raise UserError(f"device={kind}: torchrun gives each process its own; say cuda")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # Triton, streams and graphs use the current device
    if several:
        timeout = timedelta(seconds=2 * patience + 600)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return device
