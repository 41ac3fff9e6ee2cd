"""The README's three changes apply to this tree and work: a reward, an objective, a source."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRY = """
import asyncio, sys
from types import SimpleNamespace
import train
from judge import Judge

class Teacher:
    run = staticmethod(asyncio.run)
    async def ask(self, prompt, **how):
        return SimpleNamespace(text="VERDICT: " + ("UNCLEAR" if " mud" in prompt else "CLEAR"))

scores = Judge(Teacher(), rewards="clarity:2").score(
    0, ["prefix"], ["reference"], [[" water", " mud"]], ["suffix", "rollout"], [0]
)
print(scores.reward.tolist(), flush=True)
train.main(sys.argv[1:])
"""
SMALL = ["--base_steps=1", "--max_steps=1", "--batch_size=2", "--base_batch_size=2", "--rollouts=2"]
SMALL += ["--eval_prefixes=0", "--baseline=False", "--track=", "--objective=ipo"]


BLOCKS = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


def apply(block, tree, *flags):
    command = ["git", "apply", *flags, "-"]
    done = subprocess.run(command, input=block, text=True, cwd=tree, capture_output=True)
    assert done.returncode == 0, done.stderr + block


def test_they_fit_and_are_small():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert len(re.findall(r"^[+](?!\+\+)", block, re.M)) < 20
        apply(block, ROOT, "--check")


@pytest.mark.skipif(not os.environ.get("NANOSIP_FULL"), reason="trains: NANOSIP_FULL=1")
def test_they_work_together(tmp_path):
    tree = tmp_path / "tree"
    kept = shutil.ignore_patterns(".*", "out", "docs", "__pycache__", "*.jsonl")
    shutil.copytree(ROOT, tree, ignore=kept)
    for block in BLOCKS:
        apply(block, tree)
    run = tmp_path / "run"
    command = [sys.executable, "-c", TRY, *SMALL, f"--out_dir={run}", "--candidates=greedy,suffix"]
    done = subprocess.run(
        command,
        cwd=tree,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("[[2.0, 0.0]]")
    line = (run / "log.jsonl").read_text()
    assert '"loss": 25.0' in line and '"chosen.greedy"' in line  # (1 / (2 * 0.1)) ** 2
