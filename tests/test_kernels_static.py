"""The machine code of the shipped configurations, compiled without a GPU.

A share of them by default; NANOSIP_FULL=1 checks all.  Compiling cannot share a process with the
interpreter, hence `python -m tools.kernel_report` in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
WORDS = ["forward 128", "backward_key 128"]
EXTRA = {
    "sm_80": ["backward_query 128", "decode", "logprob backward"],
    "sm_90": ["backward_query 128", "logprob forward"],
    "gfx942": ["forward 64"],
}


@pytest.mark.parametrize("arch", SHARED)
def test_configurations(arch):
    words = [] if os.environ.get("NANOSIP_FULL") else WORDS + EXTRA.get(arch, [])
    run = subprocess.run(
        [sys.executable, "-m", "tools.kernel_report", arch, *words, "--json"],
        cwd=Path(__file__).parent.parent,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= len(words or WORDS)
    for row in rows:
        assert row["stack"] == 0 and row["spills"] == 0, row
        assert row["shared"] <= SHARED[arch], row
        assert row["matrix"] > 0 and row["loops"], row
        if arch != "gfx942":
            assert row["registers"] * 32 * row["warps"] <= 65_536, row
            assert row["copies"] > 0, row
        if row["expected"]:
            assert row["loops"][0][0] == row["expected"], row
