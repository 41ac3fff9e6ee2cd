"""The README's commands exist, and their flags are taken."""

import re
import shlex
from pathlib import Path

import pytest

import config as configuration

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:^    \S.*\n(?:    .*\n)*)", TEXT, re.M)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
INLINE = re.findall(r"`((?:python|pytest|make|torchrun) [^`]+)`", TEXT)
COMMANDS = [c for c in dict.fromkeys(LINES + INLINE) if re.match(r"(python|torchrun|make) ", c)]


def test_there_are_commands():
    assert any(c.startswith("make demo") for c in COMMANDS) and len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
        return
    if "LLAMA_CPP" in command:  # another project's script
        assert (ROOT / "tests/to_gguf.py").exists()
        return
    if "-m" in words[:2]:
        assert (ROOT / (words[words.index("-m") + 1].replace(".", "/") + ".py")).exists() or words[
            words.index("-m") + 1
        ].startswith("llama_cpp")
        return
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).exists(), f"{words[at]} does not exist"
    if words[at] == "train.py" and "--help" not in words and "..." not in words:
        flags = [w for w in words[at + 1 :] if "resume" not in w]
        configuration.parse([str(ROOT / f) if f.endswith(".py") else f for f in flags])
    for word in words[at + 1 :]:
        name = re.match(r"--(\w+)", word)
        if name and words[at] != "train.py":
            sources = [ROOT / words[at], *ROOT.glob("*.py")]
            assert any(f'"--{name[1]}"' in s.read_text() for s in sources), f"no flag {word}"
