"""What every shipped configuration compiles to, read off the machine code; needs no GPU.

    python -m tools.kernel_report                 every target, a Markdown table
    python -m tools.kernel_report sm_90 decode    one target, kernels whose name has a word

Each kernel is compiled for bfloat16 as a training run would specialise it (pointers and strides are
multiples of 16).  Registers and stack come from cuobjdump, instructions from nvdisasm, both of
which Triton brings along; for AMD from the assembly.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from kernels import attention, logprob
from support import command
from support.files import markdown

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = re.compile(r"HMMA|HGMMA|UTCHMMA|v_mfma")
ASYNC = re.compile(r"LDGSTS|UTMALDG")
COLUMNS = ["arch", "kernel", "tile", "warps", "stages", "registers", "stack", "spills", "shared"]
COLUMNS += ["matrix", "copies"]  # instructions


def shipped(arch):
    """(name, function, constants, warps, stages)."""
    for kernel, sizes in attention.CONFIGS[arch].items():
        for D, (BM, BN, warps, stages) in sizes.items():
            tile = dict(D=D, BM=BM, BN=BN)
            yield f"{kernel} {D}", getattr(attention, "_" + kernel), tile, warps, stages
    for kernel, (BT, BV, BK, warps, stages) in logprob.CONFIGS[arch].items():
        tile = dict(BT=BT, BV=BV, BK=BK, EVEN=True)
        yield f"logprob {kernel}", getattr(logprob, "_logprob_" + kernel), tile, warps, stages


FLOAT32 = {"Lse", "Delta", "Part", "PartLse", "Logit", "GLogp"}
POINTERS = {"Pad": "*i32", "Filled": "*i32", "Targets": "*i64"}
SIZES = {"H", "HKV", "G", "T", "P", "N", "R", "splits", "tiles", "begin", "end"}  # any integer


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


def compile_kernel(arch, function, constants, warps, stages):
    import triton
    from triton.backends.compiler import GPUTarget

    hip = arch.startswith("gfx")
    types, aligned = signature(function, constants, hip)
    return triton.compile(
        triton.compiler.ASTSource(function, types, constants, aligned),
        target=GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32),
        options=dict(num_warps=warps, num_stages=stages),
    )


def read_cuda(compiled):
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *flag, file.name], capture_output=True, text=True).stdout
            for tool, *flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        copies=len(ASYNC.findall(code)),
        matrix=len(MATRIX.findall(code)),
    )


def read_hip(compiled):
    text = compiled.asm["amdgcn"]
    field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # noqa: E731
    return dict(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count"),
        copies=0,  # gfx942 has no asynchronous copies; loads are prefetched into registers
        matrix=len(MATRIX.findall(text)),
    )


def report(arch, words=()):
    """A dict of COLUMNS for each configuration of a target; words: parts of kernels' names."""
    for name, function, tile, warps, stages in shipped(arch):
        if words and not any(word in name for word in words):
            continue
        compiled = compile_kernel(arch, function, tile, warps, stages)
        read = read_hip(compiled) if arch.startswith("gfx") else read_cuda(compiled)
        shape = " x ".join(str(x) for x in tile.values() if type(x) is int)
        how = dict(arch=arch, kernel=name, tile=shape, warps=warps, stages=stages)
        yield how | dict(shared=compiled.metadata.shared) | read


def main(arguments: list[str]):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes the default
    words = [a for a in arguments if a not in TARGETS]
    archs = [a for a in arguments if a in TARGETS] or TARGETS
    rows = (row for arch in archs for row in report(arch, words))
    print(markdown([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))


if __name__ == "__main__":
    command.run(main)
