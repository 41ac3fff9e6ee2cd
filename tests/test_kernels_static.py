"""The machine code of the shipped configurations, compiled without a GPU.

A share of them by default; NANOSIP_FULL=1 checks all.  Compiling cannot share a process with the
interpreter, hence `python -m tools.kernel_report` in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
# Shared memory of a block in bytes.  sm_80's configurations also serve sm_86, sm_89 and sm_120,
# which have less of it than an A100 (166,912).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
EXTRA = {"sm_80": ["backward_query 128", "decode"], "sm_90": ["logprob"], "gfx942": ["forward 64"]}


@pytest.mark.parametrize("arch", SHARED)
def test_configurations(arch):
    words = ["forward 128", "backward_key 128", *EXTRA.get(arch, [])]
    words = [] if os.environ.get("NANOSIP_FULL") else words
    run = subprocess.run(
        [sys.executable, "-m", "tools.kernel_report", arch, *words],
        cwd=Path(__file__).parent.parent,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    head, _, *rows = [line[2:-2].split(" | ") for line in run.stdout.splitlines()]
    assert len(rows) >= max(len(words), 3) - 1
    for row in rows:
        read = {name: int(value) for name, value in zip(head, row, strict=True) if value.isdigit()}
        assert read["stack"] == 0 == read["spills"], row
        assert read["shared"] <= SHARED[arch] and read["matrix"] > 0, row
        if arch != "gfx942":
            assert read["registers"] * 32 * read["warps"] <= 65_536 and read["copies"] > 0, row
