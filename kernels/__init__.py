"""Triton kernels, each beside the plain PyTorch that defines it.  Triton itself is optional.

In: `chosen` asks for a kernel by its definition. Out: the kernel, for tensors that it takes and
where it has passed its check: the first time it is used for a device, type and shape of heads it is
compared with its definition on a small case, forward and backward.  Where it does not compile, or
differs, one line says so and the definition computes in its place.
"""

import os
import sys
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels are never launched, so plain functions will do
    triton, tl = None, SimpleNamespace(constexpr=None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SELF_CHECK = not INTERPRETED  # the interpreter's tests compare with float64 themselves

# Arguments that change from batch to batch.  Triton would compile a kernel anew for every mixture
# of those that are multiples of 16, in the middle of a run.
VARYING = ("T", "P", "N", "R", "splits", "tiles", "begin", "end")

# Largest difference between kernel and definition, relative to the largest magnitude.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}


def jit(function):
    """A kernel, or a function that kernels call."""
    return triton.jit(function, do_not_specialize=VARYING) if triton else function


def use_triton(x) -> bool:
    """Kernels take 16-bit tensors on a GPU, and float32 or float16 in Triton's interpreter."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")
    return INTERPRETED or (triton is not None and x.is_cuda and x.dtype.itemsize == 2)


def architecture() -> str:
    """Which column of a CONFIGS table this machine uses; small or unknown GPUs share sm_80's."""
    if not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability()[0], "sm_80")


def cores(x) -> int:
    """Processors to keep busy where x lives."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


# ---- First use ---------------------------------------------------------------------------------

_verdicts: dict[tuple, bool] = {}


def chosen(kernel, definition, example, x, *shape: int):
    """The kernel where it takes x's device and type and has proved right there, else definition.

    example(draw, *shape) -> the arguments of both, draw(*sizes) being a random tensor of x's type
    and device.  Gradients are compared for those that require one.
    """
    if use_triton(x) and trusted(kernel, definition, example, x.device, x.dtype, shape):
        return kernel
    return definition


def trusted(kernel, definition, example, device, dtype, shape) -> bool:
    """Whether the kernel computes what its definition does, found out once."""
    key = (kernel, device, dtype, shape)
    if not SELF_CHECK or key in _verdicts:
        return _verdicts.get(key, True)
    try:
        error = difference(kernel, definition, example, device, dtype, shape)
        why = f"differs from its definition by {error:.1e} of the largest value"
        _verdicts[key] = error <= TOLERANCE[dtype]  # False for nan
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a compiler, an assembler or a driver may raise
        why = f"cannot run ({type(e).__name__}: {(str(e).splitlines() or [''])[0]:.200})"
        _verdicts[key] = False
    if not _verdicts[key]:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        line = f"kernels: {kernel.__name__} {shape}, {dtype}, on {where} {why}"
        print(f"{line}: PyTorch computes instead", file=sys.stderr, flush=True)
    return _verdicts[key]


def difference(kernel, definition, example, device, dtype, shape, wide=torch.float32) -> float:
    """Largest error of the kernel's value and gradients against the definition in a wide type."""
    rng = torch.Generator().manual_seed(0)  # its own: a run's random numbers stay what they are

    def draw(*sizes):
        return torch.randn(sizes, generator=rng).to(device, dtype)

    def value_and_gradients(function, inputs, kind):
        given = [
            x.detach().to(kind).requires_grad_(x.requires_grad)
            if torch.is_tensor(x) and x.is_floating_point() else x
            for x in inputs
        ]  # fmt: skip
        value = function(*given)
        leaves = [x for x in given if torch.is_tensor(x) and x.requires_grad]
        rng.manual_seed(1)
        upstream = draw(*value.shape).to(value.dtype)
        return [value, *(torch.autograd.grad(value, leaves, upstream) if leaves else ())]

    inputs = example(draw, *shape)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        found = value_and_gradients(kernel, inputs, dtype)
        exact = value_and_gradients(definition, inputs, wide)
    pairs = zip(found, exact, strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
