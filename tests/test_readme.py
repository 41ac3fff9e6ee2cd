"""The README's commands exist, their flags are taken, and its links lead where they say.

`PYTHONPATH=. python tests/test_readme.py` renews the line numbers in its links to functions.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import config as configuration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
TEXT = "\n\n".join((README, *PAGES.values()))
BLOCKS = re.findall(r"(?:^    \S.*\n(?:    .*\n)*)", TEXT, re.M)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
INLINE = re.findall(r"`((?:python|pytest|make|torchrun) [^`]+)`", TEXT)
COMMANDS = [c for c in dict.fromkeys(LINES + INLINE) if re.match(r"(python|torchrun|make) ", c)]


def test_there_are_commands():
    assert any(c.startswith("make demo") for c in COMMANDS) and len(COMMANDS) > 8


class Parsed(Exception):
    """A script has read its arguments, and would go on."""


def read_arguments(script: str, arguments: list[str], monkeypatch):
    """Start a script with these arguments, until it has read them: SystemExit where it refuses
    them, or where another file that it hands them to does."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*how, **more):
        parse(*how, **more)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch):
    words = shlex.split(command, comments=True)
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
    script, arguments = words[at], words[at + 1 :]
    assert (ROOT / script).exists(), f"{script} does not exist"
    if script != "train.py":
        if any(word.startswith("--") for word in arguments):
            if script == "harness.py":  # it asks for its library first
                pytest.importorskip("lm_eval")
            read_arguments(script, arguments, monkeypatch)
    elif "--help" not in arguments and "..." not in arguments:
        flags = [word for word in arguments if "resume" not in word]
        configuration.parse([str(ROOT / f) if f.endswith(".py") else f for f in flags])


@pytest.mark.parametrize(
    "command",
    [
        "serve.py CKPT --pools 3",  # report.py's
        "judge.py replay RUN --samples 3",  # judge.py bench's
        "data.py inspect PATH --votes 8",  # data.py filter's
        "rewrite.py quality --out=sets --votes=8",  # rewrite.py safety's
        "bench.py --megabytes=3",  # bench_data.py's
        "sample.py CKPT PREFIX --tokens=many",
    ],
)
def test_a_flag_of_another_command_is_refused(command, monkeypatch):
    script, *arguments = command.split()
    with pytest.raises(SystemExit):
        read_arguments(script, arguments, monkeypatch)


def line_of(file: str, name: str) -> int:
    """Where a function, class or method ("Class.method") of a file is defined."""
    lines, at = (ROOT / file).read_text(encoding="utf-8").splitlines(), -1
    for i, part in enumerate(name.split(".")):
        head = re.compile(rf"{'    ' * i}(?:async )?(?:def|class) {part}\b")
        at = next(n for n in range(at + 1, len(lines)) if head.match(lines[n]))
    return at + 1


def renewed(text: str) -> str:
    """text with each link [`name`](file.py#Lnumber) led to the line of that definition."""
    link = r"\[`([\w.]+)`\]\(([\w/]+\.py)#L\d+\)"
    return re.sub(link, lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[2], m[1])})", text)


def test_links_lead_to_the_lines_of_functions():
    assert README.count("#L") > 15
    assert renewed(README) == README, "PYTHONPATH=. python tests/test_readme.py renews them"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_between_pages():
    for page, text in {ROOT / "README.md": README, **PAGES}.items():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            led = (page.parent / path).resolve() if path else page
            assert led.exists(), f"{page.name}: {target}"
            if anchor and led.suffix == ".md":
                assert anchor in anchors(led.read_text(encoding="utf-8")), f"{page.name}: {target}"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(renewed(README), encoding="utf-8")
