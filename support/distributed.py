"""The processes of a torchrun: who we are, sums over everybody, a policy spread over them (FSDP2).

In: the environment that torchrun sets, modules and optimiser states. Out: the same module, of which
each process holds a share of the weights, gradients and moments; a layer's weights are gathered
while it computes. Sampling, whose number of steps differs between processes, works on a whole copy.
One process needs nothing of this, and every function does the obvious there.
"""

import contextlib
import os
import pickle
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.command import UserError


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
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in needed if name not in os.environ)
    if "RANK" in os.environ and missing:
        raise UserError(f"RANK is set without {missing}: start with torchrun, or unset it")
    several = not missing and int(os.environ["WORLD_SIZE"]) > 1
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


def choose_threads(width: int, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Set how many threads compute on the CPU, and tell: what OMP_NUM_THREADS says; one for a model
    of up to 256 features, whose small products only wait for each other on several; else one for
    each core, of those that the container's quota allows (files of cgroups 2 or 1 under root)."""
    if "OMP_NUM_THREADS" not in os.environ:
        limit = float("inf")
        for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit, nor is -1
                quota, period = map(int, " ".join((root / f).read_text() for f in files).split())
                limit = quota / period if quota > 0 else limit
        most = 1 if width <= 256 else torch.get_num_threads()
        torch.set_num_threads(max(1, int(min(most, limit))))
    return torch.get_num_threads()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The value of every process, on all of them."""
    if not dist.is_initialized():
        return [value]
    out = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def all_sum(pairs: dict) -> dict:
    """{name: (sum, count)} added up over all processes that name it."""
    out: dict = {}
    for each in gather(pairs):
        for key, (total, count) in each.items():
            before = out.get(key, (0, 0))
            out[key] = before[0] + total, before[1] + count
    return out


@contextlib.contextmanager
def agreement():
    """What is raised within on one process is raised on all, so that none is left waiting for the
    others. Such an exception has `agreed` set: work that needs all processes may follow it."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    everyone = gather(portable(error))
    if error := error or next(filter(None, everyone), None):
        error.agreed = True  # type: ignore[attr-defined]
        raise error


def portable(error: Exception | None) -> Exception | None:
    """The error, as one that another process can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---- FSDP2 --------------------------------------------------------------------------------------


def shard(model, device: torch.device):
    """Spread a model over all processes, layer by layer; gradients are summed, not averaged."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard  # a second, which others are spared

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(f"shard=True needs a newer PyTorch than {torch.__version__}: upgrade it")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def is_sharded(model) -> bool:
    return hasattr(model, "unshard")  # what fully_shard adds to a module


def is_spread(value) -> bool:
    """Whether it is a DTensor, of which a process holds a share."""
    return hasattr(value, "full_tensor")


def whole(value, device="cpu", keep: bool = True):
    """value, in nested dicts and lists, with every spread tensor gathered by all processes. One
    that does not `keep` the result takes part and holds a tensor at a time (None in its place)."""
    if is_spread(value):
        tensor = value.full_tensor()
        return tensor.to(device) if keep else None
    if isinstance(value, dict):
        return {name: whole(v, device, keep) for name, v in value.items()}
    return [whole(v, device, keep) for v in value] if isinstance(value, list) else value


def spread_as(p, value):
    """value, in one piece on all processes, spread as the parameter p is."""
    if not is_spread(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements)


def load_optimizer(optimizer, state: dict):
    """-> it, with the moments of a state in one piece, spread as the parameters; settings stay."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: dict(values) for i, values in state["state"].items()}
    for i, values in moments.items():
        for name, value in values.items():
            if value.shape == params[i].shape:
                values[name] = spread_as(params[i], value.to(params[i].device))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return optimizer
