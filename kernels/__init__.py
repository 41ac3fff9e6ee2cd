"""Triton kernels, each beside the plain PyTorch that defines it.  Triton itself is optional.

`use_triton(x)` tells whether the kernels take tensors of x's device and type, and `trusted` whether
a kernel keeps its word there: the first time it is used for a device, type and shape of heads it is
compared with its definition on a small case, forward and backward.  Where it does not compile, or
differs, one line says so and the definition computes in its place.  On a CPU nothing is compared.
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


@torch.compiler.assume_constant_result  # inside torch.compile it is asked while tracing
def trusted(kernel, definition, example, device, dtype, *shape: int) -> bool:
    """Whether `kernel` computes on this device, in this type, what `definition` does.

    example(draw, *shape) -> the arguments of both, draw(*sizes) being a random tensor of that type
    and device. Gradients are compared for those that require one.
    """
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
        name, kind = kernel.__name__.strip("_"), str(dtype).removeprefix("torch.")
        line = f"kernels: {name} {shape} in {kind} on {where} {why}: PyTorch computes instead"
        print(line, file=sys.stderr, flush=True)
    return _verdicts[key]


def difference(kernel, definition, example, device, dtype, shape) -> float:
    """Largest error of the kernel's output and gradients against the definition in float32."""
    rng = torch.Generator().manual_seed(0)  # its own: a run's random numbers stay what they are

    def draw(*sizes):
        return torch.randn(sizes, generator=rng).to(device, dtype)

    inputs = example(draw, *shape)
    exact = [
        x.detach().float().requires_grad_(x.requires_grad)
        if torch.is_tensor(x) and x.is_floating_point()
        else x
        for x in inputs
    ]
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        found, true = kernel(*inputs), definition(*exact)
        pairs = [(found, true)]
        sides = [
            [x for x in xs if torch.is_tensor(x) and x.requires_grad] for xs in (inputs, exact)
        ]
        if sides[0]:
            upstream = draw(*found.shape).to(found.dtype)
            ours = torch.autograd.grad(found, sides[0], upstream)
            pairs += zip(ours, torch.autograd.grad(true, sides[1], upstream.to(true.dtype)))
    errors = [(a.float() - b).abs().max() / b.abs().max() for a, b in pairs]
    return torch.stack(errors).max().item()  # nan if any is
