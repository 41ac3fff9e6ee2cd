"""Checkpoints: Hugging Face folders with the training state beside the weights.

A run holds checkpoints/step_000100/{config.json, model.safetensors, tokenizer files, state.pt} and
`ckpt`, a link to the newest. One is written under a temporary name, flushed to disk and renamed, so
that a run killed at any moment leaves the previous one untouched. What cannot be read is never
deleted: damage is set aside under another name, anything else ends the run.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.command import UserError
from support.distributed import rank
from support.files import flush, numbered


def save(run: Path, step: int, write: Callable[[Path], object], state: dict, keep: int) -> Path:
    """Make run/checkpoints/step_N the newest, and remove all of ours but the newest `keep`.

    write(folder) puts weights and tokenizer into an empty folder; state holds tensors and plain
    Python values. On failure (UserError) the older ones stand as they were.
    """
    folder = run / "checkpoints"
    final, temporary = folder / f"step_{step:06d}", folder / f".writing_{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        torch.save(state, temporary / "state.pt")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():  # of a start that was set back before this step
            set_aside(final, "older")
        os.replace(temporary, final)
        flush(folder)
        link = run / ".ckpt"
        link.unlink(missing_ok=True)
        link.symlink_to(final.relative_to(run), target_is_directory=True)
        os.replace(link, run / "ckpt")
        flush(run)
    except (OSError, RuntimeError, SafetensorError) as e:  # how each library reports a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        why = str(e).partition("\n")[0]
        raise UserError(f"cannot write the checkpoint {final} (disk full?): {why}") from e
    found = checkpoints(run)
    for old in found[: max(0, found.index(final) + 1 - keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; what else a user keeps there is not ours."""
    found = (run / "checkpoints").glob("step_*")
    ours = (path for path in found if re.fullmatch(r"step_\d{6,}", path.name))
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step_")))


def load(run: Path, read: Callable[[Path], object]) -> tuple:
    """The newest checkpoint that is whole, as (read(folder), state), or (None, None) without any.

    A damaged one is named in one line, set aside, and the one before it is used. UserError where a
    checkpoint is whole but cannot be read now, and where there are some and all are damaged.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            return read(folder), state
        except Exception as e:  # there is no end to what damage can raise
            why = str(e).partition("\n")[0] or type(e).__name__
            if not (damage := damage_of(folder)):
                hint = "nothing in it is damaged; mend that and run the same command again"
                raise UserError(f"checkpoint {folder} cannot be read now: {why}; {hint}") from e
            if rank() == 0:  # the others find it damaged too, or gone, and go on likewise
                aside = set_aside(folder, "damaged")
                print(f"checkpoint {folder} is damaged ({damage}), set aside as {aside.name}")
    if found:
        hint = "choose another out_dir, or move them away to begin anew"
        raise UserError(f"every checkpoint in {run / 'checkpoints'} is damaged: {hint}")
    return None, None


def damage_of(folder: Path) -> str:
    """What is broken in a checkpoint's files, "" if nothing is. OSError where they cannot be read.

    state.pt is a zip archive with a checksum for each part, a safetensors file states its length.
    """
    name = "state.pt"
    try:
        with zipfile.ZipFile(folder / name) as archive:
            if part := archive.testzip():
                return f"{name}: {part}"
        name = "model.safetensors"
        (folder / name).open("rb").close()  # the library calls missing whatever it cannot open
        with safe_open(folder / name, "pt"):
            pass
        name = "config.json"
        json.loads((folder / name).read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        return f"{name} is missing"
    except (zipfile.BadZipFile, EOFError, SafetensorError, ValueError, LookupError, TypeError) as e:
        return f"{name}: {str(e) or type(e).__name__}"
    return ""


def set_aside(folder: Path, what: str) -> Path:
    """Rename a checkpoint to step_N.WHAT, or .WHAT.1 and so on where that is taken."""
    aside = folder.with_name(f"{folder.name}.{what}")
    return folder.rename(numbered(aside) if aside.exists() else aside)
