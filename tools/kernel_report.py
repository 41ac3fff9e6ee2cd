"""What every shipped configuration compiles to, read off the machine code; needs no GPU.

    python -m tools.kernel_report                       every target, a Markdown table
    python -m tools.kernel_report sm_90 decode --json   one target, names with a word, JSON lines

Each kernel is compiled for bfloat16 as a training run would specialise it (pointers and strides are
multiples of 16).  Registers and stack come from cuobjdump, instructions from nvdisasm, both of
which Triton brings along; for AMD from the assembly.  `loops` gives (matrix, other) instructions of
every innermost loop with a matrix product, the mask-free one first.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from kernels import attention, logprob
from support import command
from support.files import markdown

# Shared memory of a block in bytes.  sm_80's configurations also serve sm_86, sm_89 and sm_120,
# which have less of it than an A100 (166,912).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTERS = 65_536  # of one SM
MATRIX = re.compile(r"HMMA|HGMMA|UTCHMMA|v_mfma")
ASYNC = re.compile(r"LDGSTS|UTMALDG")


# ---- Every shipped configuration ---------------------------------------------------------------


def shipped(arch):
    """(name, function, constants, warps, stages)."""
    for kernel, sizes in attention.CONFIGS[arch].items():
        for D, (BM, BN, warps, stages) in sizes.items():
            tile = dict(D=D, BM=BM, BN=BN)
            yield f"{kernel} {D}", getattr(attention, "_" + kernel), tile, warps, stages
    for kernel, (BT, BV, BK, warps, stages) in logprob.CONFIGS[arch].items():
        tile = dict(BT=BT, BV=BV, BK=BK, EVEN=True)
        yield f"logprob {kernel}", getattr(logprob, "_logprob_" + kernel), tile, warps, stages


def expected_matrix(name, arch, tile, warps):
    """Matrix instructions of one warp in one turn of the mask-free loop; None where unknown."""
    if arch not in ("sm_80", "sm_90"):
        return None
    if "D" not in tile:
        dots = [(tile["BT"], tile["BV"], tile["BK"])]
    else:
        D, BM, BN = tile["D"], tile["BM"], tile["BN"]
        dots = {  # rows, columns, depth of each product
            "backward_query": [(BM, BN, D), (BM, BN, D), (BM, D, BN)],
            "backward_key": [(BN, BM, D), (BN, BM, D), (BN, D, BM), (BN, D, BM)],
        }.get(name.split()[0], [(BM, BN, D), (BM, D, BN)])
    if arch == "sm_90" and dots[0][0] >= 64:  # HGMMA: 64 rows of four warps, all columns, depth 16
        return sum(max(m // 64 * 4 // warps, 1) * k // 16 for m, _, k in dots)
    return sum(m // 16 * (n // 8) * (k // 16) // warps for m, n, k in dots)  # HMMA 16 x 8 x 16


# ---- Compiling and reading ---------------------------------------------------------------------

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


def loops(lines, label, branch):
    """Opcode lists of the innermost loops: from a label to a branch that goes back to it."""
    code, labels = [], {}
    for line in lines:
        if found := re.match(label, line):
            labels[found[1]] = len(code)
        else:
            code.append(line)
    spans = []
    for end, line in enumerate(code):
        found = re.search(branch, line)
        if found and labels.get(found[1], end) < end:
            spans.append((labels[found[1]], end + 1))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [code[begin:end] for begin, end in sorted(set(inner))]


def count(lines):
    matrix = sum(bool(MATRIX.search(line)) for line in lines)
    return matrix, len(lines) - matrix


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
    keep = r"\s*(\.L_x_\d+:|/\*[0-9a-f]{4,}\*/)"
    lines = [line.strip() for line in code.splitlines() if re.match(keep, line)]
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in lines),
        copies=sum(bool(ASYNC.search(line)) for line in lines),
        matrix=sum(bool(MATRIX.search(line)) for line in lines),
        loops=[c for c in map(count, loops(lines, r"(\.L_x_\d+):", r"BRA.*`\((.*)\)")) if c[0]],
    )


def read_hip(compiled):
    text = compiled.asm["amdgcn"]
    field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # noqa: E731
    lines = [re.sub(r"\s*;.*", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line.startswith(".LBB") or line[:1].isalpha()]
    found = loops(lines, r"(\.LBB\w+):", r"s_c?branch\w*\s+(\.LBB\w+)")
    return dict(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count"),
        copies=None,  # gfx942 has no asynchronous copies; loads are prefetched into registers
        matrix=sum(bool(MATRIX.search(line)) for line in lines),
        loops=[c for c in map(count, found) if c[0]],
    )


def report(arch, words=()):
    for name, function, tile, warps, stages in shipped(arch):
        if words and not any(word in name for word in words):
            continue
        compiled = compile_kernel(arch, function, tile, warps, stages)
        read = read_hip(compiled) if arch.startswith("gfx") else read_cuda(compiled)
        shared, threads = compiled.metadata.shared, warps * compiled.metadata.warp_size
        if arch.startswith("gfx"):  # 512 registers a lane and SIMD, four SIMDs, eight waves each
            resident = min(512 // read["registers"], 8) * 4 // warps
            occupancy = min(resident, 65_536 // max(shared, 1)) * warps / 32
        else:
            fit = REGISTERS // (-(-read["registers"] // 8) * 8 * threads)
            occupancy = min(fit, (SHARED[arch] + 1024) // (shared + 1024)) * warps / 64
        shape = " x ".join(str(x) for x in tile.values() if type(x) is int)
        yield dict(
            arch=arch, kernel=name, tile=shape, warps=warps, stages=stages, shared=shared, **read,
            expected=expected_matrix(name, arch, tile, warps), occupancy=round(occupancy, 3),
        )  # fmt: skip


def main(arguments: list[str]):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes the default
    archs = [a for a in arguments if a in SHARED] or list(SHARED)
    words = [a for a in arguments if a not in SHARED and a != "--json"]
    rows = (row for arch in archs for row in report(arch, words))
    if "--json" in arguments:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    columns = "arch kernel tile warps stages registers stack spills shared matrix copies loops"
    columns = [*columns.split(), "occupancy"]
    table = [columns]
    for row in rows:
        row["loops"] = ", ".join(f"{m} + {other}" for m, other in row["loops"])
        table.append([row[c] for c in columns])
    print(markdown(table))


if __name__ == "__main__":
    command.run(main)
