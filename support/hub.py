"""Hugging Face folders: where a model's folder lies, and what its files say, read without trust.

In: a local folder, or hf://owner/name[@revision], which huggingface_hub downloads once and resumes
where it broke off. Out: its path, the shape of a Llama by config.json, the ids that end a text, the
tensors of its safetensors files. UserError for what is absent, damaged, or a model that would be
computed otherwise than by transformers; an OSError is the machine's and passes.
"""

import contextlib
import json
import re
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.command import UserError

TEXTS = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
WEIGHTS = ["*.safetensors"]


# ---- Where it lies ------------------------------------------------------------------------------


def local_folder(name: str | Path, weights: bool = True) -> Path:
    """A folder's own path, or where hf://owner/name[@revision] was put, with its weights or, for
    the shape and the tokenizer alone, without. What is no such folder is for the reader to say."""
    text = str(name)
    if text.startswith("hf://"):
        return from_hub(text, weights)
    if re.match("https?:/", text):
        raise UserError(f"{text}: a model is a folder or hf://owner/name: download it, name that")
    return Path(text).expanduser()


def from_hub(url: str, weights: bool) -> Path:
    repository, _, revision = url.removeprefix("hf://").partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{url}: write hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{url} needs a library: pip install huggingface_hub") from None
    wanted = TEXTS + WEIGHTS * weights
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
    except Exception as e:  # the hub's client lets many libraries' errors through
        known: dict = {
            hub.GatedRepoError: "asks for consent on its page, and for a token (HF_TOKEN)",
            (hub.RepositoryNotFoundError, hub.RevisionNotFoundError): "does not exist, or is "
            "private (HF_TOKEN)",
            hub.LocalEntryNotFoundError: "is not in the cache and the hub cannot be reached: "
            "download it where there is a network, and give its folder",
        }
        why = next((f" {text}" for kind, text in known.items() if isinstance(e, kind)), "")
        first = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(url + (why or f": {first}; run it again to go on")) from None
    return Path(folder)


def check_folder(name: str | Path):
    """UserError where a name is no folder, or a run's that lies above its ckpt, or a PEFT
    adapter's. hf:// names are checked when they are fetched."""
    if str(name).startswith("hf://"):
        return
    folder = local_folder(name)
    if not folder.is_dir():
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
        hint = f" (a model of the hub is written hf://{name})" if known else ""
        raise UserError(f"there is no checkpoint folder {name}{hint}")
    if (folder / "ckpt").is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} is a run: say {folder / 'ckpt'}")
    if (folder / "adapter_config.json").exists():  # transformers would load its base model
        raise UserError(f"{name} holds an adapter: merge it, by PEFT's merge_and_unload")


# ---- config.json --------------------------------------------------------------------------------

LARGEST_JSON = 64 << 20  # bytes of config.json or of an index
SIZES = {  # in ModelConfig: its name in config.json, and a limit far above that of any model
    "vocab_size": ("vocab_size", 2**24),
    "d_model": ("hidden_size", 2**18),
    "d_ff": ("intermediate_size", 2**20),
    "n_layer": ("num_hidden_layers", 2**10),
    "n_head": ("num_attention_heads", 2**12),
    "n_kv_head": ("num_key_value_heads", 2**12),
    "head_dim": ("head_dim", 2**14),
    "max_seq": ("max_position_embeddings", 2**31),
}
ONLY = {  # with other values than these, transformers computes something else
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False, True),
    "partial_rotary_factor": (1,),
    "sliding_window": (),
    "quantization_config": (),
    "per_layer_config": (),
    "transformers_weights": (),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_object(path: Path) -> dict:
    """What a JSON file of bounded size says, which must be an object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def without_null(value: dict) -> dict:
    """As null stands for absent."""
    return {key: inner for key, inner in value.items() if inner is not None}


def number(key: str, value, path: Path) -> float:
    """value as a float; UserError unless it is a positive number."""
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{path}: {key} must be a positive number, found {value!r:.80}")
    return float(value)


def read_rope(hf: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling) as ModelConfig holds them. transformers 5 writes rope_parameters, older ones
    rope_scaling, which goes first where both stand, and rope_theta, which goes last."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, found {rope!r:.80}")
    rope = without_null(rope)
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope type {kind!r:.80} is neither default nor llama3")
    only_supported(rope, path)
    if kind == "llama3":
        original = LLAMA3[-1]
        rope.setdefault(original, hf["max_position_embeddings"])
        rope[original] = hf.get(original, rope[original])
        scaling = {key: number(f"rope {key}", rope.get(key), path) for key in LLAMA3}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError(f"{path}: rope low_freq_factor must be below high_freq_factor")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    return number("rope_theta", theta, path), scaling


def only_supported(hf: dict, path: Path):
    """UserError for what a Llama of this file would compute differently."""
    for key, known in ONLY.items():
        if key in hf and hf[key] not in known:
            what = f"only {' or '.join(map(repr, known))} is" if known else "which is not"
            raise UserError(f"{path}: {key} is {hf[key]!r:.80}, {what} supported")


def read_shape(folder: str | Path) -> dict:
    """The fields of a ModelConfig by config.json, with transformers' defaults, and the folder's
    generation_config.json. Only dimensions are required."""
    check_folder(folder)
    path = local_folder(folder, weights=False) / "config.json"
    hf = without_null(read_object(path))
    if "model_type" not in hf:
        raise UserError(f"{path} names no model_type; only 'llama' is supported")
    only_supported(hf, path)
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    hf.setdefault("max_position_embeddings", 2048)
    theta, scaling = read_rope(hf, path)
    shape: dict = {}
    for our, (key, limit) in SIZES.items():
        value = hf.get(key, shape["d_model"] // shape["n_head"] if our == "head_dim" else None)
        if type(value) is not int or not 0 < value < limit:
            raise UserError(
                f"{path}: {key} must be a positive integer below {limit}, found {value!r:.80}"
            )
        shape[our] = value
    heads, kv_heads, per_head = shape["n_head"], shape["n_kv_head"], shape["head_dim"]
    if heads % kv_heads or per_head % 2:
        raise UserError(
            f"{path}: {heads} heads, {kv_heads} key-value heads of {per_head} dimensions "
            "do not fit together"
        )
    generation = path.with_name("generation_config.json")
    return shape | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6), path),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "token_ids": {key: hf[key] for key in TOKEN_IDS if key in hf},
        "generation": read_object(generation) if generation.exists() else None,
    }


# ---- What ends a text ---------------------------------------------------------------------------


def end_ids(*configs: dict | None) -> tuple[int, ...]:
    """eos_token_id, one or a list, of each of the configs, without repetition."""
    found: list = []
    for config in configs:
        ids = (config or {}).get("eos_token_id", [])
        found += ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(i for i in found if type(i) is int and i >= 0))


def end_tokens(folder: str | Path, tokenizer) -> tuple[int, ...]:
    """Every id that ends a text by any file of a model's folder, the tokenizer's own first."""
    folder = local_folder(folder, weights=False)
    names = "config", "generation_config", "tokenizer_config", "special_tokens_map"
    paths = [folder / f"{name}.json" for name in names]
    files = [read_object(path) for path in paths if path.exists()]
    named = [file.get("eos_token") for file in files]
    named = [token.get("content") if isinstance(token, dict) else token for token in named]
    ids = [i for token, i in tokenizer.specials.items() if token in named]
    return tuple(dict.fromkeys((tokenizer.eos, *end_ids(*files), *ids)))


# ---- Tensors ------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors or, as for transformers only where it is absent, the shards of the index,
    whose names may not lead out of the folder."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise UserError(
            f"{folder} holds neither model.safetensors nor an index of shards; weights in other "
            "files are not read: save them by transformers' save_pretrained"
        )
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index} is not a safetensors index: it has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index}: {name!r:.200} is no shard, or leads out of the folder")
    return sorted(folder / name for name in set(names.values()))


def opened(path: Path):
    """A safetensors file, whose library calls missing whatever it cannot open."""
    try:
        path.open("rb").close()
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy or download it again") from None
    except SafetensorError as e:
        raise UserError(f"{path} cannot be read (damaged or cut off): {e}") from None


def read_tensors(folder: Path, shapes: dict, device, dtype, alike: tuple = ()) -> dict:
    """{name: tensor [shapes[name]]}, all of them, but that of those `alike` one suffices.

    dtype None keeps that of the files, the widest where they hold several. Buffers of rotary
    tables, which old versions saved, are left out; any other tensor too much is refused.
    """
    files, state = [opened(path) for path in weight_files(folder)], {}
    held = {name: file for file in files for name in sorted(file.keys())}
    held = {name: file for name, file in held.items() if ".rotary_emb." not in name}
    missing, extra = sorted(shapes.keys() - held.keys()), sorted(held.keys() - shapes.keys())
    if missing and not (len(missing) == 1 and missing[0] in alike):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first: {missing[0]}")
    if extra:
        raise UserError(f"{folder}: {len(extra)} tensors belong to no Llama, the first: {extra[0]}")
    for name, file in held.items():
        kind, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
        if kind not in ("F64", "F32", "F16", "BF16") or shape != list(shapes[name]):
            raise UserError(
                f"{folder}: {name} holds {kind} of shape {shape}, config.json asks for floats "
                f"of {list(shapes[name])}"
            )
        state[name] = file.get_tensor(name).to(device, dtype)
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    return {name: tensor.to(widest) for name, tensor in state.items()}


# ---- Writing ------------------------------------------------------------------------------------


def write_folder(folder: Path, shape: dict, state: dict):
    """config.json of a ModelConfig's fields, generation_config.json where it has one, and the
    tensors as model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    rope = shape["rope_scaling"]
    if rope is not None:
        rope = {"rope_type": "llama3", **rope, LLAMA3[-1]: int(rope[LLAMA3[-1]])}
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: shape[our] for our, (key, _) in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rope_theta"],
        "rope_scaling": rope,
        "tie_word_embeddings": shape["tie_embeddings"],
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **shape["token_ids"],
    }
    for name, value in (("config", hf), ("generation_config", shape["generation"])):
        if value is not None:
            text = json.dumps(value, indent=2) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # the library lets its owner alone read the file
        weights.chmod((folder / "config.json").stat().st_mode & 0o777)
