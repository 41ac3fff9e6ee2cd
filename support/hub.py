"""Hugging Face folders: where a model's folder lies, and what its files say, read without trust.

In: a local folder, or hf://owner/name[@revision], which huggingface_hub downloads once and resumes
where it broke off. Out: its path, the shape of a model by config.json, the tensors of its
safetensors files. UserError for what is absent, damaged, or a model that would be computed
otherwise than by transformers; an OSError is the machine's and passes.
"""

import contextlib
import json
import math
import re
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.command import UserError

TEXTS = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
WEIGHTS = ["*.safetensors"]


def local_folder(name: str | Path, weights: bool = True) -> Path:
    """A folder's own path, or where hf://owner/name[@revision] was put, with its weights or, for
    the shape and the tokenizer alone, without. What is no such folder is for the reader to say."""
    if not str(name).startswith("hf://"):
        return Path(name).expanduser()
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@(.+))?", str(name))
    if not parts:
        raise UserError(f"{name}: write hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download

        patterns = TEXTS + WEIGHTS * weights
        return Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=patterns))
    except ImportError:
        raise UserError(f"{name} needs a library: pip install huggingface_hub") from None
    except Exception as e:  # the hub's client lets many libraries' errors through
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(
            f"{name} cannot be fetched: {why} (a private or gated model needs HF_TOKEN; what broke "
            "off goes on; without a network, name the folder of a copy)"
        ) from None


def check_folder(folder: Path):
    """UserError where it is no folder, or a run's that lies above its ckpt, or a PEFT adapter's."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder} (the hub's are hf://owner/name)")
    if (folder / "ckpt").is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} is a run: say {folder / 'ckpt'}")
    if (folder / "adapter_config.json").exists():  # transformers would load its base model
        raise UserError(f"{folder} holds an adapter: merge it, by PEFT's merge_and_unload")


# ---- config.json --------------------------------------------------------------------------------

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
MISTRAL = dict(max_position_embeddings=2**17, num_key_value_heads=8, sliding_window=4096)
QWEN = dict(max_position_embeddings=2**15, num_key_value_heads=32, use_sliding_window=False)
SMOLLM3 = QWEN | dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True)
FAMILIES: dict = {  # model_type: class, fields of ModelConfig, what of config.json is no Llama's
    "llama": ("Llama", {}, {}),
    "mistral": ("Mistral", {}, MISTRAL),
    "qwen2": ("Qwen2", dict(qkv_bias=True), QWEN),
    "qwen3": ("Qwen3", dict(qk_norm="head"), QWEN | dict(head_dim=128)),
    "olmo2": ("Olmo2", dict(qk_norm="whole", norm_after=True), dict(rms_norm_eps=1e-5)),
    "smollm3": ("SmolLM3", {}, SMOLLM3),
}
ONLY = {  # with other values than these, transformers computes something else
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False, True),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "per_layer_config": (),
    "transformers_weights": (),
    "mscale_all_dim": (),  # this and the next of yarn
    "truncate": (True,),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
ORIGINAL = "original_max_position_embeddings"
RULES = {  # the numbers of each rope type
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", "beta_fast", "beta_slow", ORIGINAL, "attention_factor"),
}


def read_object(path: Path) -> dict:
    """The object that a JSON file holds."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as a JSON object: {e}") from None


def without_null(value: dict) -> dict:
    """As null stands for absent."""
    return {key: inner for key, inner in value.items() if inner is not None}


def number(hf: dict, key: str, default, path: Path) -> float:
    """A positive number of config.json, UserError if it is none."""
    value: float = hf.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{path}: {key} must be a positive number, found {value!r:.80}")
    return value


def read_rope(hf: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling) as ModelConfig holds them. transformers 5 writes rope_parameters, older ones
    rope_scaling, which goes first where both stand, and rope_theta, which goes last."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_scaling must be one rule for all layers, found {rope!r:.80}")
    rope = without_null(rope)
    only_supported(rope, path)
    theta = number({**hf, **rope}, "rope_theta", 10000.0, path)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in tuple(RULES):
        raise UserError(f"{path}: rope type {kind!r:.80} is not default, {', '.join(RULES)}")
    rope = {"beta_fast": 32, "beta_slow": 1, ORIGINAL: hf["max_position_embeddings"], **rope}
    rope[ORIGINAL] = hf.get(ORIGINAL, rope[ORIGINAL])
    grown = max(number(rope, "factor", None, path), 1)
    rope = {"attention_factor": 0.1 * math.log(grown) + 1, **rope}  # yarn's, by its equation 22
    scaling = {key: number(rope, key, None, path) for key in RULES[kind]}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: rope low_freq_factor must be below high_freq_factor")
    return theta, {"rope_type": kind, **scaling}


def within_window(hf: dict, positions: int, path: Path) -> int:
    """How many positions see all before them in every layer, as here all do."""
    used = hf.get("use_sliding_window", True) or hf["model_type"] == "mistral"
    if not used or "sliding" not in str(hf.get("layer_types", "sliding")):
        return positions
    return min(positions, int(number(hf, "sliding_window", positions, path)))


def rotating(hf: dict, layers: int, path: Path) -> list:
    """SmolLM 3's no_rope_layers: 0 for layers without rotary positions, by default each fourth."""
    every = number(hf, "no_rope_layer_interval", 4, path)
    marks = hf.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if not isinstance(marks, list) or len(marks) < layers:
        raise UserError(f"{path}: no_rope_layers must mark {layers} layers, found {marks!r:.80}")
    return marks


def only_supported(hf: dict, path: Path):
    """UserError for what a model of this file would compute differently."""
    for key, known in ONLY.items():
        if key in hf and hf[key] not in known:
            what = f"only {' or '.join(map(repr, known))} is" if known else "which is not"
            raise UserError(f"{path}: {key} is {hf[key]!r:.80}, {what} supported")


def read_shape(folder: str | Path) -> dict:
    """The fields of a ModelConfig by config.json, with transformers' defaults, and the folder's
    generation_config.json. Only model_type and dimensions are required."""
    check_folder(folder := local_folder(folder, weights=False))
    path = folder / "config.json"
    raw = read_object(path)
    only_supported({"model_type": None, **without_null(raw)}, path)
    _, differs, defaults = FAMILIES[raw["model_type"]]
    raw = defaults | raw  # where null may stand for something else than what is absent
    hf = {"max_position_embeddings": 2048, **without_null(raw)}
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    shape: dict = {**differs}
    for our, (key, limit) in SIZES.items():
        value = hf.get(key, shape["d_model"] // shape["n_head"] if our == "head_dim" else None)
        if type(value) is not int or not 0 < value < limit:
            found = f"found {value!r:.80}"
            raise UserError(f"{path}: {key} must be a positive integer below {limit}, {found}")
        shape[our] = value
    if shape["n_head"] % shape["n_kv_head"] or shape["head_dim"] % 2:
        rule = "num_key_value_heads must divide num_attention_heads, head_dim must be even"
        raise UserError(f"{path}: {rule}")
    shape["rope_theta"], shape["rope_scaling"] = read_rope(hf, path)
    kept = {key: hf[key] for key in TOKEN_IDS if key in hf}
    kept |= {key: raw[key] for key in WINDOWS if key in raw}
    if (window := within_window(hf, shape["max_seq"], path)) < shape["max_seq"]:
        kept["max_position_embeddings"], shape["max_seq"] = shape["max_seq"], window
    if hf["model_type"] == "smollm3":
        shape["rotates"] = rotating(hf, shape["n_layer"], path)
    shape |= dict(family=hf["model_type"], kept=kept)
    shape["norm_eps"] = number(hf, "rms_norm_eps", 1e-6, path)
    shape["tie_embeddings"] = bool(hf.get("tie_word_embeddings", False))
    generation = path.with_name("generation_config.json")
    shape["generation"] = read_object(generation) if generation.exists() else None
    return shape


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
    names: dict = read_object(index).get("weight_map", {"": "nothing"})
    for name in names.values() if isinstance(names, dict) else [names]:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index}: weight_map names {name!r:.200}, no shard in the folder")
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
    files = [opened(path) for path in weight_files(folder)]
    held = {name: file for file in files for name in sorted(file.keys())}
    held = {name: file for name, file in held.items() if ".rotary_emb." not in name}
    missing, extra = sorted(shapes.keys() - held.keys()), sorted(held.keys() - shapes.keys())
    if missing and not (len(missing) == 1 and missing[0] in alike):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first: {missing[0]}")
    if extra:
        raise UserError(f"{folder}: {len(extra)} tensors are too many, the first: {extra[0]}")
    state = {}
    for name, file in held.items():
        kind, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
        if kind not in ("F64", "F32", "F16", "BF16") or shape != list(shapes[name]):
            asked = f"config.json asks for floats of {list(shapes[name])}"
            raise UserError(f"{folder}: {name} holds {kind} of shape {shape}, {asked}")
        state[name] = file.get_tensor(name).to(device, dtype)
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    return {name: tensor.to(widest) for name, tensor in state.items()}


def write_folder(folder: Path, shape: dict, state: dict):
    """config.json of a ModelConfig's fields, generation_config.json where it has one, and the
    tensors as model.safetensors."""
    hf = {
        "architectures": [FAMILIES[shape["family"]][0] + "ForCausalLM"],
        "model_type": shape["family"],
        **{key: shape[our] for our, (key, _) in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rope_theta"],
        "rope_scaling": shape["rope_scaling"],
        "tie_word_embeddings": shape["tie_embeddings"],
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **({"no_rope_layers": shape["rotates"]} if shape["rotates"] else {}),
        **shape["kept"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("config", hf), ("generation_config", shape["generation"])):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # the library lets its owner alone read the file
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o777)
