"""The pages: every command's flags are taken by that command, every link leads somewhere, and the
README's "How one step works" goes through the code in its order."""

import argparse
import ast
import importlib
import re
import shlex
from unittest.mock import Mock

import pytest

import config as configuration
from support.command import ROOT

FLOORS = (".", "kernels", "support")
PAGES = {path: path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)


def commands() -> list[str]:
    """What the pages tell a reader to type: in indented blocks and in backticks."""
    text = "\n\n".join(text for page, text in PAGES.items() if page.name != "CHANGELOG.md")
    blocks = re.findall(r"^    \S.*\n(?:    .*\n)*", text, re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    lines = [line.strip().partition("   ")[0] for line in lines]  # what follows is a remark
    typed = re.compile(r"(?:\w+=\S+ )*((?:python|torchrun|make) .+)")  # behind its environment
    found = (typed.fullmatch(x) for x in lines + re.findall(r"`([^`\n]+)`", text))
    return list(dict.fromkeys(match[1] for match in found if match))


class Parsed(Exception):
    """A command has read its arguments, and would go on."""


@pytest.fixture
def parse(monkeypatch):
    """Calls a file's main() until it has read its arguments, or refuses them by its own error."""
    stopped = Mock(side_effect=Parsed)
    for owner, name in ((argparse.ArgumentParser, "parse_args"), (configuration, "parse")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real: stopped(real(*given)))
    monkeypatch.chdir(ROOT)

    def start(module: str, arguments: list[str]):
        with pytest.raises(Parsed):
            importlib.import_module(module).main(arguments)

    return start


@pytest.mark.parametrize("command", commands())
def test_a_command_is_taken(command, parse):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        assert {word for word in words if "=" not in word} <= set(TARGETS)
        return
    if program == "torchrun":  # its own flags come first
        words = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    file, arguments = words[0], words[1:]
    if file.lower().startswith("llama_cpp"):
        return
    assert (ROOT / file).exists()
    takes_flags = "parse" in (ROOT / file).read_text("utf-8") and not file.startswith("tests/")
    if takes_flags and not {"...", "--help"} & set(arguments):
        parse(file.removesuffix(".py").replace("/", "."), arguments)


def test_a_flag_of_another_command_is_refused(parse):
    with pytest.raises(SystemExit):
        parse("tools.replay", ["RUN", "--samples", "3"])  # tools.bench_judge's


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            led = (page.parent / path).resolve() if path else page
            heads = re.findall(r"^#+ (.*)$", PAGES.get(led, ""), re.M)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert led.exists() and (not anchor or anchor in anchors), f"{page.name}: {target}"


def test_one_step_is_told_in_the_order_of_the_code():
    """Steps 1 to 5 name what the code defines; what the loop itself calls, in its order."""
    text = PAGES[ROOT / "README.md"].partition("## How one step works")[2]
    steps = text.partition("\n1. ")[2].partition("\n\n")[0]
    told = [name.rpartition(".")[2] for name in re.findall(r"`([A-Za-z_.]+)`", steps)]
    source = "".join(p.read_text("utf-8") for f in FLOORS for p in ROOT.glob(f"{f}/*.py"))
    assert set(told) <= set(re.findall(r"(?:def|class) (\w+)", source))
    tree = ast.parse((ROOT / "train.py").read_text("utf-8"))
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    loop = next(node for node in ast.walk(train) if isinstance(node, ast.While))
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
    calls.sort(key=lambda func: (func.lineno, func.col_offset))
    names = dict.fromkeys(getattr(func, "id", getattr(func, "attr", "")) for func in calls)
    called = [name for name in names if name in told]
    assert len(called) > 4 and [name for name in told if name in called] == called
