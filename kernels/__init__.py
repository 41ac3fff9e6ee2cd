"""Triton kernels, each beside the plain PyTorch that defines it.  Triton itself is optional."""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the kernels are never launched, so plain functions will do
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
