"""The three changes of docs/extending.md apply to this tree and work: a reward, an objective, a
candidate source."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from support.command import ROOT

BLOCKS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text("utf-8"), re.S)
TRY = """
import asyncio, sys
from types import SimpleNamespace
import train
from config import Config
from judge import Judge

class Teacher:
    run = staticmethod(asyncio.run)
    async def ask(self, prompt, **how):
        return SimpleNamespace(text="VERDICT: " + ("UNCLEAR" if " mud" in prompt else "CLEAR"))

scores = Judge(Teacher(), Config(rewards="clarity:2")).score(
    0, ["prefix"], ["reference"], [[" water", " mud"]], ["suffix", "rollout"], [0]
)
print(scores.reward.tolist(), flush=True)
train.main(sys.argv[1:])
"""
SMALL = ["--base_steps=1", "--max_steps=1", "--batch_size=2", "--base_batch_size=2", "--track="]
SMALL += ["--eval_prefixes=0", "--baseline=False"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository with all three changes."""
    tree = tmp_path_factory.mktemp("changed") / "tree"
    kept = shutil.ignore_patterns(".*", "out", "__pycache__", "*.png", "*.jsonl")
    shutil.copytree(ROOT, tree, ignore=kept)
    for block in BLOCKS:
        apply = ["git", "apply", "-"]
        done = subprocess.run(apply, input=block, text=True, cwd=tree, capture_output=True)
        assert done.returncode == 0, done.stderr + block
    return tree


def run(tree, *command) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    how = dict(cwd=tree, capture_output=True, text=True, env=environment)
    done = subprocess.run([sys.executable, *command], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_they_fit_together_are_small_and_can_be_estimated(tree):
    assert len(BLOCKS) == 3
    assert all(len(re.findall(r"^[+](?!\+\+)", block, re.M)) < 20 for block in BLOCKS)
    flags = ["--rewards=quality,clarity:0.5", "--objective=hinge", "--candidates=greedy,suffix"]
    assert "clarity 64" in run(tree, "train.py", *flags, "--dry_run")


@pytest.mark.skipif(not os.environ.get("NANOSIP_FULL"), reason="trains: NANOSIP_FULL=1")
def test_they_work_together(tree, tmp_path):
    flags = [*SMALL, f"--out_dir={tmp_path}", "--objective=hinge", "--candidates=greedy,suffix"]
    assert run(tree, "-c", TRY, *flags).startswith("[[2.0, 0.0]]")
    line = (tmp_path / "log.jsonl").read_text()
    assert '"loss": 1.0' in line and '"chosen.greedy"' in line  # no margin yet
