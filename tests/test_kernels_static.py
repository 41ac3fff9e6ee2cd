"""Every shipped configuration of the kernels compiles, without a GPU, to code that spills nothing,
fits the card's shared memory and multiplies on its matrix units.

A share of them by default; NANOSIP_FULL=1 checks all.  Each is compiled for bfloat16 as a training
run would specialise it (pointers and strides are multiples of 16).
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from kernels import INTERPRETED, attention, logprob

nvidia = pytest.importorskip("triton.backends.nvidia")
if INTERPRETED:
    pytest.skip("compiling cannot share a process with the interpreter", allow_module_level=True)
# Shared memory of a block in bytes.  sm_80's configurations also serve sm_86, sm_89 and sm_120,
# which have less of it than an A100 (166,912).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
SOME = ("forward 128", "backward_key 128", "sm_80 backward_query 128", "sm_80 decode")
SOME += ("sm_90 logprob", "gfx942 forward 64")
MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"
ASYNC = r"\bcp\.async"  # gfx942 has no asynchronous copies
FLOAT32 = {"Lse", "Delta", "Part", "PartLse", "Logit", "GLogp"}
POINTERS = {"Pad": "*i32", "Filled": "*i32", "Targets": "*i64"}
SIZES = {"H", "HKV", "G", "T", "P", "N", "R", "splits", "tiles", "begin", "end"}  # any integer


def shipped():
    """(target and kernel, function, constants, warps, stages)."""
    for arch in SHARED:
        for kernel, sizes in attention.CONFIGS[arch].items():
            for D, (BM, BN, *how) in sizes.items():
                tile = dict(D=D, BM=BM, BN=BN)
                yield f"{arch} {kernel} {D}", getattr(attention, f"_{kernel}"), tile, *how
        for kernel, (BT, BV, BK, *how) in logprob.CONFIGS[arch].items():
            tile = dict(BT=BT, BV=BV, BK=BK, EVEN=True)
            yield f"{arch} logprob {kernel}", getattr(logprob, f"_logprob_{kernel}"), tile, *how


def signature(function, constants, hip):
    """Types of the arguments, and what Triton would find out about them at the launch: multiples of
    16, and on AMD tensors below 2 GB, which it reads with buffer instructions."""
    types, aligned = {}, {}
    for n, name in enumerate(function.arg_names):
        vocabulary = name == "V" and "Hidden" in function.arg_names
        if name in constants:
            types[name] = "constexpr"
        elif name == "scale":
            types[name] = "fp32"
        elif name in SIZES or vocabulary:
            types[name] = "i32"
        else:
            pointer = POINTERS.get(name, "*fp32" if name in FLOAT32 else "*bf16")
            types[name] = pointer if name[0].isupper() else "i32"
            aligned[n,] = [["tt.divisibility", 16]]
            if hip and name[0].isupper():
                aligned[n,].append(["tt.pointer_range", 32])
    return types, aligned


def stack_of(compiled, folder: Path) -> int:
    """Bytes a thread, to which also a register that is spilled would go."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])[1])
    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    said = subprocess.check_output([tool, "--dump-resource-usage", folder / "cubin"], text=True)
    return int(re.search(r"STACK:(\d+)", said)[1])


@pytest.mark.parametrize(
    "name, function, tile, warps, stages",
    [x for x in shipped() if os.environ.get("NANOSIP_FULL") or any(s in x[0] for s in SOME)],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_configuration(name, function, tile, warps, stages, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes the default
    arch = name.split()[0]
    hip = arch.startswith("gfx")
    types, aligned = signature(function, tile, hip)
    compiled = triton.compile(
        triton.compiler.ASTSource(function, types, tile, aligned),
        target=GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32),
        options=dict(num_warps=warps, num_stages=stages),
    )
    code = compiled.asm["amdgcn" if hip else "ptx"]
    assert stack_of(compiled, tmp_path) == 0 and compiled.metadata.shared <= SHARED[arch]
    assert re.search(MATRIX, code) and (hip or re.search(ASYNC, code))
