"""A policy spread over the processes of a torchrun (FSDP2): shard=True.

In: a Llama, whole on every process. Out: the same module, of which each process holds a share of
the weights, gradients and optimiser state; a layer's weights are gathered while it computes.
Sampling, whose number of steps differs between processes, works on a whole copy of the weights.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Llama
from support.command import UserError


def shard(model: Llama, device: torch.device) -> Llama:
    """Spread the model over all processes; gradients are summed, not averaged."""
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
    return isinstance(model, FSDPModule)


def whole(value, device="cpu"):
    """value, in nested dicts and lists, with every spread tensor gathered by all processes."""
    if isinstance(value, DTensor):
        return value.full_tensor().to(device)
    if isinstance(value, dict):
        return {name: whole(v, device) for name, v in value.items()}
    return [whole(v, device) for v in value] if isinstance(value, list) else value


def whole_model(model: Llama, device="cpu") -> Llama:
    """The model itself where it is not spread, else a copy in one piece on every process."""
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy = Llama(model.config)
    weights = whole({name: p.detach() for name, p in model.named_parameters()}, device)
    copy.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    return copy


def load_optimizer(optimizer, state: dict):
    """Take the moments from a state in one piece, spread as the parameters are; settings stay."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {}
    for i, p in enumerate(params):
        spread[i] = dict(state["state"].get(i, {}))
        for name, value in spread[i].items():
            if isinstance(p, DTensor) and value.shape == p.shape:
                value = value.to(p.device_mesh.device_type)
                spread[i][name] = distribute_tensor(value, p.device_mesh, p.placements)
    moments = {i: s for i, s in spread.items() if s}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
