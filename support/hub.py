"""Models from elsewhere: hf://owner/name (through huggingface_hub) and https folders -> a folder.

In: what stands for a model folder. Out: a local path, downloaded once and resumed where it broke
off. An https folder is cached under ~/.cache/nanosip (or NANOSIP_CACHE), the hub has its own cache.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import requests

from support.command import UserError

OPTIONAL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
TEXTS = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
WEIGHTS = ["*.safetensors"]
TIMEOUT = 60  # seconds without a byte


def local_folder(name: str | Path, weights: bool = True) -> Path:
    """A folder's own path, or where hf://owner/name[@revision] or an http(s) folder was put, with
    its weights or, for the shape and the tokenizer alone, without."""
    text = str(name)
    if text.startswith("hf://"):
        return from_hub(text, weights)
    if text.startswith(("https://", "http://")):
        return from_web(text.rstrip("/"), weights)
    return Path(name)


def from_hub(url: str, weights: bool) -> Path:
    repository, _, revision = url.removeprefix("hf://").partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{url}: write hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{url} needs a library: pip install huggingface_hub") from None
    try:
        wanted = TEXTS + WEIGHTS * weights
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
    except hub.GatedRepoError:
        raise UserError(
            f"{url} asks for consent on its page, and for a token (hf auth login, or HF_TOKEN)"
        ) from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
        raise UserError(f"{url} does not exist, or is private (HF_TOKEN)") from None
    except hub.LocalEntryNotFoundError:
        raise UserError(
            f"{url} is not in the cache and the hub cannot be reached: "
            "download it where there is a network, and give its folder"
        ) from None
    except Exception as e:  # the hub's client lets many libraries' errors through
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"{url}: {reason or type(e).__name__}; run it again to go on") from None
    return Path(folder)


def from_web(url: str, weights: bool) -> Path:
    """config.json, the tokenizer's files, and the weights or their shards, from below url."""
    cache = Path(os.environ.get("NANOSIP_CACHE") or Path.home() / ".cache" / "nanosip")
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:  # the processes of a torchrun all come here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / (".weights" if weights else ".texts")).exists():
            return folder
        fetch(url, "config.json", folder)
        for name in OPTIONAL:
            fetch(url, name, folder, optional=True)
        (folder / ".texts").touch()
        if not weights:
            return folder
        index = "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if fetch(url, index, folder, optional=True):
            shards = shard_names(f"{url}/{index}", (folder / index).read_text(encoding="utf-8"))
        for name in shards:
            fetch(url, name, folder)
        (folder / ".weights").touch()
    return folder


def shard_names(where: str, text: str) -> list[str]:
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where} is not a safetensors index") from None
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"{where}: shard name {name!r} leads out of the folder")
    return names


def fetch(url: str, name: str, folder: Path, optional: bool = False) -> bool:
    """One file, under a temporary name until it is whole; -> False where it does not exist."""
    final, part = folder / name, folder / f"{name}.part"
    if final.exists():
        return True
    where = f"{url}/{name}"
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(where, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code in (403, 404) and optional:
                return False
            if answer.status_code != 416:  # 416: it was whole already
                if answer.status_code >= 400:
                    raise UserError(f"{where}: the server answers {answer.status_code}")
                with part.open("ab" if answer.status_code == 206 else "wb") as out:
                    for block in answer.iter_content(1 << 16):
                        out.write(block)
    except (requests.RequestException, OSError) as e:
        raise UserError(
            f"{where} cannot be read ({type(e).__name__}): run it again to go on with it"
        ) from None
    part.replace(final)
    return True


def check_folder(name: str):
    """ValueError where a name, but for a URL, is no folder, or a run's that lies above its ckpt."""
    if "://" in str(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {name}")
    if (folder / "ckpt").is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name} is a run: say {folder / 'ckpt'}")
