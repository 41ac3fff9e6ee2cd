"""Files that are there whole or as they were, whenever the process or the machine stops; JSON lines
in, Markdown tables out."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path


def flush(path: Path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numbered(path: Path) -> Path:
    """PATH.1, PATH.2 ...: the first that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def write_bytes(path: Path, content: bytes):
    """Write beside the file, under a name that nothing reads, and rename that."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str):
    """The same in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a file of ours, one a line; a line that a killed process cut off is left out.

    Nothing where there is no file. (A corpus, where damage is told, is read by support/sources.py.)
    """
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def markdown(rows: list[list]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
