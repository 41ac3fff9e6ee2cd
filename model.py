"""The policy: a Llama-family transformer that reads and writes Hugging Face folders.

In: tokens laid out as [left-padded prefix of P | C continuations of N], described by (pad per row,
P, N) alone. A prefix token attends causally to the prefix; a continuation token to the whole prefix
and, causally, to its own continuation; positions of every continuation restart after the prefix.
So a prefix is computed once however many continuations are scored, and C = 0 or 1 is
ordinary causal attention.
Out: hidden states, or the log-probability of every continuation token.

Parameters carry the names of transformers' LlamaForCausalLM, so a state dict is a checkpoint.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import prefix_attention
from kernels.logprob import linear_logprob
from support.command import UserError
from support.hub import local_folder


@dataclass
class ModelConfig:
    """The shape of a Llama; config.json's names for it are in write_config."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int  # divides n_head; grouped-query attention when smaller
    d_model: int  # width of the residual stream
    d_ff: int  # width inside the MLP
    head_dim: int  # even; n_head * head_dim need not be d_model
    max_seq: int = 2048  # positions it was made for
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or the llama3 rule as config.json spells it
    norm_eps: float = 1e-5
    tie_embeddings: bool = False


def preset(name: str, vocab_size: int) -> ModelConfig:
    """Shapes by name for `init_from=scratch`; the vocabulary comes from the tokenizer.

    world: 0.4M parameters for a laptop. llama-1.4b: the paper's size in the Llama 2 architecture.
    """
    #        layers heads kv    d    ff  tied   theta
    shapes = {
        "world": (3, 4, 4, 96, 256, True, 1e4),
        "world-teacher": (6, 4, 4, 96, 256, True, 1e4),
        "llama-1.4b": (24, 16, 16, 2048, 5632, False, 1e4),
        "smollm2-135m": (30, 9, 3, 576, 1536, True, 1e5),
        "smollm2-360m": (32, 15, 5, 960, 2560, True, 1e5),
        "smollm2-1.7b": (24, 32, 32, 2048, 8192, True, 1.3e5),
    }
    if name not in shapes:
        raise UserError(f"unknown model preset {name!r}; there are: {', '.join(shapes)}")
    n_layer, n_head, n_kv_head, d_model, d_ff, tied, theta = shapes[name]
    return ModelConfig(
        vocab_size,
        n_layer,
        n_head,
        n_kv_head,
        d_model,
        d_ff,
        d_model // n_head,
        rope_theta=theta,
        tie_embeddings=tied,
    )


def rope_frequencies(config: ModelConfig, device=None) -> torch.Tensor:
    """Angle per position of each pair of dimensions: float32 [head_dim / 2].

    The llama3 rule (Llama 3.1 model card) keeps high frequencies, divides low ones by `factor` and
    blends in between, so that a model trained on `original_max_position_embeddings` reads further.
    """
    D = config.head_dim
    freq = config.rope_theta ** (-torch.arange(0, D, 2, device=device).float() / D)
    if (rule := config.rope_scaling) is not None:
        turns = rule["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rule["factor"]
    return freq


def rope_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B, T] -> cos, and sin as `rotate` wants it, float32 [B, 1, T, head_dim]."""
    angle = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, H, T, D]; dimension i pairs with i + D/2, as in transformers."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def positions(pad: torch.Tensor, prefix: int, length: int, total: int) -> torch.Tensor:
    """Position of every token of the layout: int64 [B, total]; padding gets 0."""
    index = torch.arange(total, device=pad.device)
    if total > prefix:
        index[prefix:] = prefix + torch.arange(total - prefix, device=pad.device) % length
    return (index - pad[:, None]).clamp(min=0)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.head_dim = config, config.head_dim
        self.q_proj = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=False)

    def qkv(self, x, cos, sin):
        """x [B, T, d] -> q [B, H, T, D], k, v [B, Hkv, T, D], rotated."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, in two halves around attention, which training and the sampler do differently."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, compiled: bool = False):
        """x [B, T, d] -> [B, T, d]; attend(q, k, v) -> what each token attended [B, T, H * D]."""
        before, after = self.before, self.after
        if compiled:
            before, after = (partial(half, self) for half in compiled_halves())
        return after(x, attend(*before(x, cos, sin)))

    def before(self, x, cos, sin):
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x, attended):
        """x [B, T, d], attended [B, T, H * D] -> [B, T, d]."""
        x = x + self.self_attn.o_proj(attended)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return x + self.mlp(self.post_attention_layernorm(x))
        for part in x.flatten(0, 1).split(512):  # so that no wide tensor holds all tokens
            part += self.mlp(self.post_attention_layernorm(part))
        return x


@cache
def compiled_halves():
    """Block.before and Block.after by torch.compile, once for all layers and most shapes."""
    return [torch.compile(half, dynamic=True) for half in (Block.before, Block.after)]


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)


class Llama(nn.Module):
    """The policy: `forward` gives hidden states [..., d], `logits` of them [..., V], and `logprobs`
    scores continuations without these. `initialise` (by seed) or load_model gives the weights, in
    training float32; the layers compute in autocast's type where that is on."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activations, in the backward pass: less memory, a third more time
        self.compiled = False  # layers, where gradients are computed
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialise(self, seed: int):
        """Normal(0, 0.02), projections into the residual stream smaller by sqrt(2 * layers)."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.data.fill_(1.0)
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02
            p.data.copy_(torch.randn(p.shape, generator=rng) * std)
        return self

    def forward(self, tokens, pad, prefix: int, length: int, cache: list | None = None):
        """Final hidden states of the layout.

        tokens int64 [B, T] with T = prefix + C * length, pad int [B]: left padding of each prefix.
        -> hidden [B, T, d]. A `cache` holds each layer's (k, v), [B, Hkv, T, D], which are filled.
        """
        B, T = tokens.shape
        cos, sin = rope_tables(self.config, positions(pad, prefix, length, T))

        def attend(q, k, v, layer: int):
            if cache is not None:
                cache[layer][0].copy_(k), cache[layer][1].copy_(v)
            return prefix_attention(q, k, v, pad, prefix, length).transpose(1, 2).flatten(2)

        x, training = self.model.embed_tokens(tokens), torch.is_grad_enabled()
        for i, layer in enumerate(self.model.layers):
            inputs = x, cos, sin, partial(attend, layer=i), self.compiled and training
            if self.recompute and training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.model.norm(x)

    def logprobs(self, prefix, pad, continuations, lengths=None, temperature: float = 1.0):
        """log p(continuation token | prefix, the continuation so far).

        prefix int64 [B, P] with P >= 1, pad int [B], continuations int64 [B, C, N];
        lengths int [B, C] says how many tokens of each count (default: all N).
        -> float32 [B, C, N], 0 beyond the length. The logits never exist all at once.
        """
        B, C, N = continuations.shape
        P = prefix.shape[1]
        # The last token of a continuation predicts nothing, so it is not fed.
        tokens = torch.cat((prefix, continuations[:, :, :-1].flatten(1)), dim=1)
        hidden = self(tokens, pad, P, N - 1)
        first = hidden[:, None, P - 1 : P].expand(B, C, 1, -1)  # predicts every first token
        rest = hidden[:, P:].unflatten(1, (C, N - 1)) if N > 1 else first[:, :, :0]
        # Autocast leaves them float32, which the 16-bit kernels would not take.
        hidden = torch.cat((first, rest), dim=2).to(autocast_dtype(self))  # [B, C, N, d]
        targets = continuations
        if lengths is not None:
            beyond = torch.arange(N, device=prefix.device) >= lengths[:, :, None]
            targets = continuations.masked_fill(beyond, -100)
        logp = linear_logprob(
            hidden.reshape(B * C * N, -1), self.lm_head.weight, targets.reshape(-1), temperature
        )
        return logp.view(B, C, N)

    def logits(self, hidden):
        return self.lm_head(hidden)


def autocast_dtype(model: Llama) -> torch.dtype:
    """The type that the model's linear layers compute in."""
    weight = model.lm_head.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


# --- Hugging Face folders ------------------------------------------------------------------------


# Far above any model, and low enough that a shape is refused before its modules are made.
LARGEST = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
}
LARGEST_JSON = 64 << 20  # bytes of config.json or of an index


def read_object(path: Path) -> dict:
    """A JSON file of bounded size that holds an object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def only_supported(hf: dict, path: Path):
    """UserError for what a Llama of this file would compute differently."""
    fixed = {
        "model_type": (hf.get("model_type"), "llama"),
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(hf.get("attention_bias")), False),
        "mlp_bias": (bool(hf.get("mlp_bias")), False),
        "quantization_config": (hf.get("quantization_config"), None),
    }
    for key, (found, needed) in fixed.items():
        if found != needed:
            raise UserError(f"{path}: {key} is {found!r:.80}, only {needed!r} is supported")


def size(hf: dict, key: str, path: Path, default=None) -> int:
    """A dimension of the model; UserError unless it is a positive integer below its limit."""
    value, limit = hf.get(key, default), LARGEST.get(key, 2**31)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < limit:
        raise UserError(
            f"{path}: {key} must be a positive integer below {limit}, found {value!r:.80}"
        )
    return value


def number(key: str, value, path: Path) -> float:
    """value as a float; UserError unless it is a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise UserError(f"{path}: {key} must be a positive number, found {value!r:.80}")
    return float(value)


def rope_of(hf: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling) as ModelConfig holds them, from either of transformers' two spellings."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, found {rope!r:.80}")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope type {kind!r:.80} is neither default nor llama3")
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {key: number(f"rope {key}", rope.get(key), path) for key in keys}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError(f"{path}: rope low_freq_factor must be below high_freq_factor")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    return number("rope_theta", theta, path), scaling


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a Llama-family folder -> ModelConfig; UserError names what does not fit."""
    path = local_folder(folder, weights=False) / "config.json"
    if not path.exists():
        why = "has no config.json" if path.parent.is_dir() else "does not exist"
        raise UserError(f"the model folder {path.parent} {why}")
    hf = read_object(path)
    only_supported(hf, path)
    theta, scaling = rope_of(hf, path)
    heads, d_model = size(hf, "num_attention_heads", path), size(hf, "hidden_size", path)
    per_head = d_model // heads
    config = ModelConfig(
        vocab_size=size(hf, "vocab_size", path),
        n_layer=size(hf, "num_hidden_layers", path),
        n_head=heads,
        n_kv_head=size(hf, "num_key_value_heads", path, heads),
        d_model=d_model,
        d_ff=size(hf, "intermediate_size", path),
        head_dim=size(hf, "head_dim", path) if hf.get("head_dim") else per_head,
        max_seq=size(hf, "max_position_embeddings", path, 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6), path),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )
    if config.n_head % config.n_kv_head or config.head_dim % 2 or not config.head_dim:
        raise UserError(
            f"{path}: {config.n_head} heads, {config.n_kv_head} key-value heads of "
            f"{config.head_dim} dimensions do not fit together"
        )
    return config


def write_config(config: ModelConfig, folder: Path, dtype: torch.dtype, bos, eos):
    rope = None
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **config.rope_scaling}
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor of the folder lies. Shard names may not lead out of the folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} is not a safetensors index: it has no weight_map")
        for name in names.values():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise UserError(f"{index}: {name!r:.200} is no shard, or leads out of the folder")
        return {tensor: folder / name for tensor, name in names.items()}
    if not single.exists():
        raise UserError(f"{folder} holds neither model.safetensors nor an index of shards")
    try:
        with safe_open(single, "pt") as f:
            return dict.fromkeys(f.keys(), single)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{single} cannot be read (damaged or cut off): {e}") from None


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """Read a Hugging Face folder (single or sharded safetensors); dtype None keeps the file's."""
    folder = local_folder(folder)
    config = read_config(folder)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # how torch says that there is none
        raise UserError(f"device {device}: {e}") from None
    if str(device).startswith("cuda:"):
        torch.cuda.set_device(device)  # Triton, streams and graphs use the current device
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    files = {n: f for n, f in tensor_files(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        files.pop("lm_head.weight", None)
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first: {missing[0]}")
    if extra := sorted(files.keys() - wanted.keys()):
        raise UserError(f"{folder}: {len(extra)} tensors belong to no Llama, the first: {extra[0]}")
    state = {}
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, "pt") as f:
                for name in (n for n, p in files.items() if p == path):
                    held = f.get_slice(name)
                    shape = torch.Size(held.get_shape())
                    if held.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise UserError(f"{path}: {name} holds {held.get_dtype()}, not floats")
                    if shape != wanted[name]:
                        raise UserError(
                            f"{path}: {name} has shape {list(shape)}, config.json "
                            f"asks for {list(wanted[name])}"
                        )
                    state[name] = f.get_tensor(name).to(device, dtype)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read (damaged or cut off): {e}") from None
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_model(model: Llama, folder: str | Path, bos: int | None = None, eos: int | None = None):
    """Write config.json and model.safetensors that transformers, vLLM and llama.cpp read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(model.config, folder, next(iter(state.values())).dtype, bos, eos)
