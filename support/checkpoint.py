"""Checkpoints: Hugging Face folders with the training state beside the weights.

A run holds checkpoints/step_000100/{config.json, model.safetensors, tokenizer files, state.pt} and
`ckpt`, a link to the newest. One is written under a temporary name, flushed to disk and renamed, so
that a run killed at any moment leaves the previous one untouched.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import load_model, save_model
from support.command import UserError
from support.distributed import rank
from support.files import flush


def save(run: Path, step: int, policy, tokenizer, state: dict, keep: int) -> Path:
    """Write run/checkpoints/step_N, point run/ckpt at it, remove all but the newest `keep`.

    state holds tensors and plain Python values. On failure the older ones stand as they were.
    """
    folder = run / "checkpoints"
    final, temporary = folder / f"step_{step:06d}", folder / f".writing_{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(policy, temporary, tokenizer.bos, tokenizer.eos)
        tokenizer.save(temporary)
        torch.save(state, temporary / "state.pt")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
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
    here = found.index(final) + 1
    for old in (*found[: max(0, here - keep)], *found[here:]):  # later ones were damaged
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def load(run: Path, device) -> tuple:
    """The newest checkpoint that can be read: (policy, state), or (None, None).

    A damaged one is named in one line and the one before it is used.
    """
    for folder in reversed(checkpoints(run)):
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            return load_model(folder, device), state
        except Exception as e:  # there is no end to what damage can raise
            if rank() == 0:
                why = str(e).partition("\n")[0] or type(e).__name__
                print(f"checkpoint {folder} is damaged, trying the one before it: {why}")
    return None, None
