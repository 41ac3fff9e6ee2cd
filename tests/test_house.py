"""The house: who may import whom, and how large it may grow. docs/design.md says why."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = ("kernels", "support")
ROOMS = ("world", "evaluation", "teachers", "study", "tools")
# Which other rooms a room may name.
NEIGHBOURS = {
    "world": (),
    "evaluation": ("world",),
    "teachers": ("world", "evaluation", "tools"),
    "study": ("world", "evaluation", "teachers", "tools"),
    "tools": ("world", "evaluation", "teachers"),
}
FILES = [p.relative_to(ROOT) for f in (".", *GROUND, *ROOMS) for p in (ROOT / f).glob("*.py")]
MODULES = {str(path.with_suffix("")).replace("/", "."): path for path in FILES}


def floor(module: str) -> str:
    return module.partition(".")[0] if "." in module else "root"


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module of ours, function around the import or "") of a file, lazy imports included."""

    def walk(node, function: str):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                deeper = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [name if name in MODULES else child.module for name in deeper]
            yield from ((name, function) for name in names if name in MODULES or name in GROUND)
            yield from walk(child, inside)

    yield from walk(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")


def test_imports_go_down_only():
    wrong = []
    for module, path in MODULES.items():
        own = floor(module)
        for name, function in imports(path):
            other = floor(name) if name not in GROUND else name
            fine = other == own or other in GROUND
            if own in ROOMS:
                fine |= other == "root" or other in NEIGHBOURS[own]
            if (module, function) == ("train", "main"):  # the demo, and the table of a run's end
                fine |= other in ROOMS
            if own in GROUND:
                fine = other in GROUND
            if not fine:
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_no_circle():
    """Files can be put in an order in which each imports only what stands before it."""
    needs = {m: {n for n, _ in imports(p)} - {m, *GROUND} for m, p in MODULES.items()}
    needs["train"] = {name for name in needs["train"] if floor(name) not in ROOMS}
    while free := {module for module, others in needs.items() if not others}:
        needs = {m: others - free for m, others in needs.items() if m not in free}
    assert needs == {}


def lines(*folders: str) -> int:
    files = [p for folder in folders for p in (ROOT / folder).glob("*.py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


@pytest.mark.parametrize(
    ("folders", "most"),
    [  # lines; the last two should come to 9,500 and 5,500
        (["."], 3000),
        ([".", "kernels"], 4011),
        ([".", *GROUND, *ROOMS], 13262),
        (["tests"], 7675),
    ],
    ids=["root", "root and kernels", "outside tests", "tests"],
)
def test_it_does_not_grow(folders, most):
    assert lines(*folders) <= most
    assert len(list(ROOT.glob("*.py"))) <= 13
    assert len((ROOT / "train.py").read_text().splitlines()) <= 300


def test_what_train_reads():
    code = "import sys, train; print(*(m.__file__ for m in sys.modules.values() "
    code += "if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    read = [Path(line) for line in done.stdout.splitlines()]
    ours = {path.relative_to(ROOT) for path in read if path.is_relative_to(ROOT)} & set(FILES)
    assert len(ours) <= 30  # where it should come to: 25 files and 4,500 lines
    assert sum(len((ROOT / path).read_text().splitlines()) for path in ours) <= 6350
    assert {path.parts[0] for path in ours if len(path.parts) > 1} == set(GROUND)


def test_functions_are_short():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                most = 68 if (str(path), node.name) == ("train.py", "train") else 50
                if length > most and path.parts[0] != "kernels":
                    long.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    assert long == []
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 16 << 10 and readme.count(b"\n") <= 250
