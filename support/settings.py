"""The settings of a program: a dataclass whose fields are its keys, filled from files and flags.

In: the dataclass, of str, int, float and bool fields made by `key`; arguments FILE.py, FILE.py:ROW
and --key=value, of which later ones win; or a saved config.json. Out: {key: value}. A config file
is Python that assigns keys, and may assign `rows`, a dict of named rows with keys of their own.
What is unknown is a UserError that names the nearest.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import runpy
import types
import typing
from pathlib import Path

from support.command import UserError

WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
ROW_NOTES = ("label", "paper")  # what a row says of itself beside keys


def key(default, meaning, group=""):
    """A field with its line of help; group: the heading before it."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "group": group})


def convert(name: str, value, kind: type, where: str):
    """value as `kind`; text comes from flags. An int serves as a float, 1e3 as an int; no nan."""
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        if kind is bool:
            return WORDS[str(value).lower()]
        if kind is str and isinstance(value, list | tuple):
            return ",".join(map(str, value))
        if kind is str and isinstance(value, str | int | float):
            return str(value)
        if kind is not str and not isinstance(value, bool):
            whole = kind is int and isinstance(value, int | str) and "e" not in str(value)
            number = int(value) if whole else float(value)  # int alone keeps more than 53 bits
            if number == kind(number):
                return kind(number)
    raise UserError(f"{where}: {name} needs {kind.__name__}, not {value!r}")


def converted(settings: type, changes: dict, where: str) -> dict:
    """The changes in the types of their keys."""
    kinds, values = typing.get_type_hints(settings), {}
    for name, value in changes.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1, cutoff=0)[0]
            raise UserError(f"{where}: there is no key {name!r}; the nearest is {near!r}")
        values[name] = convert(name, value, kinds[name], where)
    return values


def read_arguments(settings: type, argv: list[str]) -> dict:
    """The keys that a command line sets; --key alone sets one that is true or false."""
    given: dict = {}
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            if not equals and typing.get_type_hints(settings).get(name) is not bool:
                raise UserError(f"{arg}: write --{name}=value")
            given |= converted(settings, {name: value if equals else True}, arg)
        elif re.search(r"\.py(:|$)", arg):
            given |= converted(settings, read_file(arg), arg)
        else:
            raise UserError(f"{arg}: neither a config file (.py) nor --key=value")
    return given


def read_file(argument: str) -> dict:
    """The keys that FILE.py, or FILE.py:ROW, assigns. It is Python: what it raises is its own."""
    file, colon, row = argument.partition(".py:")
    found, rows = execute(file + ".py" * bool(colon))
    if not colon:
        if rows:
            raise UserError(f"{argument} holds rows: say {argument}:ROW, one of {', '.join(rows)}")
        return found
    if row not in rows:
        near = difflib.get_close_matches(row, rows, 1, cutoff=0)
        hint = f"the nearest is {near[0]!r}" if near else "it has no rows"
        raise UserError(f"{file}.py: there is no row {row!r}; {hint}")
    return found | {k: v for k, v in rows[row].items() if k not in ROW_NOTES}


def execute(name: str) -> tuple[dict, dict]:
    """(top-level keys, rows by name as the file has them, ROW_NOTES included) of a config file."""
    if not Path(expand(name)).is_file():
        raise UserError(f"{name}: no such config file")
    try:
        found = runpy.run_path(expand(name))
    except Exception as e:
        raise UserError(f"{name}: {type(e).__name__}: {e}") from e
    found = {k: v for k, v in found.items() if k[0] != "_" and not isinstance(v, types.ModuleType)}
    return found, found.pop("rows", {})


def read_saved(settings: type, gone: dict, was: dict, path: Path) -> dict:
    """The keys of a config.json; those that are no more are left out. gone: keys of older versions
    with the value that is what is done now, any other is an error; was: keys that they did not
    write, with the value that is what they did."""
    try:
        saved = was | json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name, value in gone.items() if saved.get(name, value) != value]:
            raise UserError(f"{path} sets {other[0]}, which is no more: the run cannot go on here")
        kept = {f.name: saved[f.name] for f in dataclasses.fields(settings) if f.name in saved}
        return converted(settings, kept, str(path))
    except (ValueError, TypeError) as e:
        why = e if isinstance(e, UserError) else f"{path} is damaged: restore or delete it"
        raise UserError(f"{why}, or choose another out_dir") from None


def expand(text: str) -> str:
    """Each of the comma-separated paths with ~ as the home folder, which a shell leaves alone
    behind --key=."""
    return ",".join(os.path.expanduser(part) for part in text.split(","))


def names(text: str) -> list[str]:
    """'suffix, rewrite' -> ['suffix', 'rewrite']"""
    return [word.strip() for word in text.split(",") if word.strip()]


def nested(text: str) -> dict:
    """'a.b=1,c=low' -> {"a": {"b": 1}, "c": "low"}; a value is JSON, or else a plain word."""
    out: dict = {}
    left = text.strip()
    while left:
        path, _, left = left.partition("=")
        try:
            value, end = json.JSONDecoder().raw_decode(left)
            if left[end:].lstrip()[:1] not in ("", ","):
                raise ValueError
        except ValueError:
            value, end = left.partition(",")[0].strip(), 0
        left = left[end:].partition(",")[2].lstrip()
        *outer, last = path.split(".")
        place = out
        for name in outer:
            place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not re.fullmatch(r"\w+(\.\w+)*", path) or not isinstance(place, dict) or value == "":
            raise UserError(f"{text!r}: write field=value or outer.inner=value, commas between")
        place[last] = value
    return out


def help_text(settings: type) -> str:
    """Every key with its default, type and meaning."""
    lines = []
    for f in dataclasses.fields(settings):
        if f.metadata["group"]:
            lines += ["", f.metadata["group"]]
        flag, kind = f"--{f.name}={f.default}", type(f.default).__name__
        lines.append(f"  {flag:<36} {kind:<6} {f.metadata['meaning']}")
    return "\n".join(lines)
