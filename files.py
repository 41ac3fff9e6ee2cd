"""Files that are there whole or as they were, whenever the process or the machine stops."""

import os
from pathlib import Path


def flush(path: Path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes):
    """Write beside the file, under a name that nothing reads, and rename that."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str):
    """The same in UTF-8."""
    write_bytes(path, text.encode("utf-8"))
