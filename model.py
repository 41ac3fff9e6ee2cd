"""The policy: a Llama or a near relative that reads and writes Hugging Face folders.

In: tokens laid out as [left-padded prefix of P | C continuations of N], described by (pad per row,
P, N) alone. A prefix token attends causally to the prefix; a continuation token to the whole prefix
and, causally, to its own continuation; positions of every continuation restart after the prefix.
So a prefix is computed once however many continuations are scored, and C = 0 or 1 is
ordinary causal attention.
Out: hidden states, or the log-probability of every continuation token.

Parameters carry the names of transformers' LlamaForCausalLM, so a state dict is a checkpoint.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import Config
from kernels.attention import prefix_attention
from kernels.lean import gated, normed
from kernels.logprob import linear_logprob
from support import hub
from support.command import UserError
from support.distributed import is_sharded, whole


@dataclass
class ModelConfig:
    """The shape of a Llama or a relative; config.json's names for it are in support/hub.py."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int  # divides n_head; grouped-query attention when smaller
    d_model: int  # width of the residual stream
    d_ff: int  # width inside the MLP
    head_dim: int  # even; n_head * head_dim need not be d_model
    max_seq: int = 2048  # positions it was made for, none of them beyond a sliding window
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or a rule as config.json spells it, all its numbers
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    family: str = "llama"  # config.json's model_type; in what it differs from Llama:
    qkv_bias: bool = False  # Qwen 2
    qk_norm: str = ""  # of queries and keys: each "head" has its own (Qwen 3), the "whole" (OLMo 2)
    norm_after: bool = False  # norms stand behind attention and MLP, not before them (OLMo 2)
    rotates: list[int] = field(default_factory=list)  # 0: no rope in this layer (SmolLM 3); or []
    # What the folder of the weights says beside, handed on when they are saved:
    kept: dict = field(default_factory=dict)  # config.json's ids that begin and end texts, windows
    generation: dict | None = None  # generation_config.json


def preset(name: str, vocab_size: int) -> ModelConfig:
    """Shapes by name for `init_from=scratch`; the vocabulary comes from the tokenizer.

    world: 0.4M parameters for a laptop. llama-1.4b: the paper's size in the Llama 2 architecture.
    """
    shapes = {  # layers, heads, kv heads, d, ff, tied, theta
        "world": (3, 4, 4, 96, 256, True, 1e4),
        "world-teacher": (6, 4, 4, 96, 256, True, 1e4),
        "llama-1.4b": (24, 16, 16, 2048, 5632, False, 1e4),
        "smollm2-135m": (30, 9, 3, 576, 1536, True, 1e5),
    }
    if name not in shapes:
        raise UserError(f"unknown model preset {name!r}; there are: {', '.join(shapes)}")
    layers, heads, kv_heads, d, ff, tied, theta = shapes[name]
    more: dict = dict(head_dim=d // heads, tie_embeddings=tied, rope_theta=theta)
    return ModelConfig(vocab_size, layers, heads, kv_heads, d, ff, **more)


def rope_frequencies(config: ModelConfig, device=None) -> torch.Tensor:
    """Angle per position of each pair of dimensions: float32 [head_dim / 2].

    A rule divides frequencies by `factor`, so that a model trained on so many positions reads
    further: linear all of them; llama3 (Llama 3.1 model card) and yarn (Peng et al. 2023, section
    3.2) keep high ones and blend in between, by turns within `original_max_position_embeddings`.
    """
    D, rule = config.head_dim, config.rope_scaling
    freq = config.rope_theta ** (-torch.arange(0, D, 2, device=device).float() / D)  # [D / 2]
    if rule is None:
        return freq
    keep: Any = 0.0
    if rule["rope_type"] == "llama3":
        turns = rule["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif rule["rope_type"] == "yarn":
        # The pair that turns beta times; between the two of them the blend is linear in the pair.
        turns = rule["original_max_position_embeddings"] / (2 * math.pi)
        step = 2 * math.log(config.rope_theta) / D  # between the logarithms of neighbours' turns
        low, high = (math.log(turns / rule[beta]) / step for beta in ("beta_fast", "beta_slow"))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        ramp = (torch.arange(D // 2, device=device) - low) / ((high - low) or 0.001)
        keep = 1 - ramp.clamp(0, 1)
    return keep * freq + (1 - keep) * freq / rule["factor"]


def rope_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B, T] -> cos, and sin as `rotate` wants it, float32 [B, 1, T, head_dim]."""
    freq = rope_frequencies(config, positions.device)  # [D / 2]
    angle = positions[:, None, :, None].float() * freq  # [B, 1, T, D / 2]
    scale = (config.rope_scaling or {}).get("attention_factor", 1.0)  # yarn's, of q and of k
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, H, T, D]; dimension i pairs with i + D/2, as in transformers."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def positions(pad: torch.Tensor, prefix: int, length: int, total: int) -> torch.Tensor:
    """Position of every token of the layout: int64 [B, total]; padding gets 0.

    With pad 2, P = 5, N = 3 and C = 2:   . . 0 1 2 | 3 4 5 | 3 4 5   (here . is 0, too)
    """
    index = torch.arange(total, device=pad.device)  # [total]
    if total > prefix:  # every continuation stands right behind the prefix
        index[prefix:] = prefix + torch.arange(total - prefix, device=pad.device) % length
    return (index - pad[:, None]).clamp(min=0)  # [B, total]


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        """In its weight's type, so that under autocast 16-bit products are normed in float32."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.head_dim = config, config.head_dim
        q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.rotate = rotate if not c.rotates or c.rotates[layer] else lambda x, cos, sin: x
        linear = partial(nn.Linear, c.d_model, bias=c.qkv_bias)
        self.q_proj, self.k_proj, self.v_proj = linear(q), linear(kv), linear(kv)
        self.o_proj = nn.Linear(q, c.d_model, bias=False)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            q, kv = (q, kv) if c.qk_norm == "whole" else (c.head_dim, c.head_dim)
            self.q_norm, self.k_norm = RMSNorm(q, c.norm_eps), RMSNorm(kv, c.norm_eps)

    def qkv(self, norm, x, cos, sin):
        """Of norm(x), x [B, T, d] -> q [B, H, T, D], k, v [B, Hkv, T, D], rotated."""
        q, k, v = normed(norm, (self.q_proj, self.k_proj, self.v_proj), x)
        q, k = self.heads(q, self.q_norm), self.heads(k, self.k_norm)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), self.heads(v)

    def heads(self, z, norm=None):
        """z [B, T, heads * D] -> [B, heads, T, D]; a norm is as wide as a head, or as z."""
        if norm is not None:
            z = norm(z.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2).to(z.dtype)
        return z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, norm, x):
        """Of norm(x), x [..., d] -> [..., d], over d_ff gated features of each token."""
        return gated(*normed(norm, (self.gate_proj, self.up_proj), x), self.down_proj)


class Block(nn.Module):
    """One layer, in two halves around attention, which training and the sampler do differently."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        after, norm = config.norm_after, partial(RMSNorm, config.d_model, config.norm_eps)
        self.input_layernorm = nn.Identity() if after else norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()  # Llama's stands before the MLP
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = norm() if after else nn.Identity()
        first, middle = self.input_layernorm, self.post_attention_layernorm
        none, last = nn.Identity(), self.post_feedforward_layernorm
        # Before and behind attention, before and behind the MLP; a tuple adds no names of tensors.
        self.norms = (none, middle, none, last) if after else (first, none, middle, none)

    def forward(self, x, cos, sin, attend, compiled: bool = False):
        """x [B, T, d] -> [B, T, d]; attend(q, k, v) -> what each token attended [B, T, H * D]."""
        before, after = self.before, self.after
        if compiled:
            before, after = (partial(half, self) for half in compiled_halves())
        return after(x, attend(*before(x, cos, sin)))

    def before(self, x, cos, sin):
        """x [B, T, d] -> q [B, H, T, D], k, v [B, Hkv, T, D]."""
        return self.self_attn.qkv(self.norms[0], x, cos, sin)

    def after(self, x, attended):
        """x [B, T, d], attended [B, T, H * D] -> [B, T, d]."""
        _, behind_attention, before, behind = self.norms
        x = x + behind_attention(self.self_attn.o_proj(attended))
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return x + behind(self.mlp(before, x))
        for part in x.flatten(0, 1).split(512):  # so that no wide tensor holds all tokens
            part += behind(self.mlp(before, part))
        return x


@cache
def compiled_halves():
    """Block.before and Block.after by torch.compile, once for all layers and most shapes."""
    return [torch.compile(half, dynamic=True) for half in (Block.before, Block.after)]


class Trunk(nn.Module):
    """What transformers' names call `model`: all but the output layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        empty = torch.empty(config.vocab_size, config.d_model)  # torch's own numbers cost seconds
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class Llama(nn.Module):
    """The policy: `forward` gives hidden states [..., d], `lm_head` of them logits [..., V], and
    `logprobs` scores continuations without these. `initialise` (by seed) or load_model gives the
    weights, in training float32; the layers compute in autocast's type where that is on."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activations, in the backward pass: less memory, a third more time
        self.compiled = False  # layers, where gradients are computed
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialise(self, seed: int):
        """Normal(0, 0.02), into the residual stream smaller by sqrt(2 * layers); biases are 0."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data.zero_()
            elif p.dim() > 1:
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
            out = prefix_attention(q, k, v, pad, prefix, length)  # [B, H, T, D]
            return out.transpose(1, 2).flatten(2)  # [B, T, H * D]

        x, training = self.model.embed_tokens(tokens), torch.is_grad_enabled()  # [B, T, d]
        for i, layer in enumerate(self.model.layers):
            inputs = x, cos, sin, partial(attend, layer=i), self.compiled and training
            if self.recompute and training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.model.norm(x)

    def logprobs(
        self, prefix, pad, continuations, lengths=None, temperature: float = 1.0, on_prefix=None
    ):
        """log p(continuation token | prefix, the continuation so far).

        prefix int64 [B, P] with P >= 1, pad int [B], continuations int64 [B, C, N];
        lengths int [B, C] says how many tokens of each count (default: all N).
        -> float32 [B, C, N], 0 beyond the length. The logits never exist all at once.
        on_prefix(hidden [B, P, d], output weights [V, d]) is shown the prefix's states, which are
        computed anyway.
        """
        B, C, N = continuations.shape
        P = prefix.shape[1]
        # The last token of a continuation predicts nothing, so it is not fed.
        tokens = torch.cat((prefix, continuations[:, :, :-1].flatten(1)), dim=1)
        hidden = self(tokens, pad, P, N - 1)  # [B, P + C * (N - 1), d]
        if on_prefix:
            on_prefix(hidden[:, :P].to(self.compute_dtype), self.lm_head.weight)
        # The prefix's last token predicts the first one of every continuation,
        first = hidden[:, None, P - 1 : P].expand(B, C, 1, -1)  # [B, C, 1, d]
        # and each token of a continuation the one behind it.
        rest = hidden[:, P:].unflatten(1, (C, N - 1)) if N > 1 else first[:, :, :0]
        # Autocast leaves them float32, which the 16-bit kernels would not take.
        hidden = torch.cat((first, rest), dim=2).to(self.compute_dtype)  # [B, C, N, d]
        targets = continuations
        if lengths is not None:
            beyond = torch.arange(N, device=prefix.device) >= lengths[:, :, None]
            targets = continuations.masked_fill(beyond, -100)  # [B, C, N]; -100: counts as 0
        logp = linear_logprob(
            hidden.reshape(B * C * N, -1), self.lm_head.weight, targets.reshape(-1), temperature
        )  # [B * C * N]
        return logp.view(B, C, N)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the linear layers compute in."""
        weight, kind = self.lm_head.weight, self.lm_head.weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a text by the folder of the weights; () for new ones. (The tokenizer's own
        end of text is not among them for certain.)"""
        found: list = []
        for said in (self.config.kept, self.config.generation or {}):
            ids = said.get("eos_token_id", [])
            found += ids if isinstance(ids, list) else [ids]
        return tuple(dict.fromkeys(i for i in found if type(i) is int and i >= 0))


# ---- Hugging Face folders -----------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a folder, or of its hf://owner/name; UserError names what does not fit."""
    return ModelConfig(**hub.read_shape(folder))


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """Read a Hugging Face folder, or hf://owner/name: one safetensors file or shards.

    dtype None keeps the files'. UserError where they are damaged, or not what config.json says.
    """
    config = read_config(folder)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # how torch says that there is none
        raise UserError(f"device {device}: {e}") from None
    if str(device).startswith("cuda:"):
        torch.cuda.set_device(device)  # Triton, streams and graphs use the current device
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).state_dict().items()}
    tied = (EMBED, HEAD) if config.tie_embeddings else ()
    state = hub.read_tensors(hub.local_folder(folder), shapes, device, dtype, alike=tied)
    if tied:  # files in use hold one of the two, the other, or both
        state = {EMBED: state.get(HEAD), HEAD: state.get(EMBED), **state}
        if not torch.equal(state[EMBED], state[HEAD]):
            config.tie_embeddings = False  # whatever config.json says
    return assemble(config, state)


def initial_policy(config: Config, vocab_size: int, device) -> Llama:
    """The policy before the first step, float32 on the device: new weights by seed, or init_from's.

    UserError where they cannot be read, or hold fewer positions or tokens than the run needs.
    """
    if config.init_from == "scratch":
        shape = preset(config.model, vocab_size)
        shape.max_seq = max(shape.max_seq, config.max_seq)
        policy = Llama(shape).initialise(config.seed).to(device)
    else:
        policy = load_model(config.init_from, device, torch.float32)
    shape, made = policy.config, f"init_from={config.init_from} was made for"
    if shape.max_seq < config.max_seq:
        made += f" {shape.max_seq} positions (max_position_embeddings or sliding_window)"
        raise UserError(f"{made}, fewer than max_seq={config.max_seq}")
    if shape.vocab_size < vocab_size:
        found = f"tokenizer={config.tokenizer} has {vocab_size}"
        raise UserError(f"{made} {shape.vocab_size} tokens, {found}: choose its own")
    return policy


def assemble(config: ModelConfig, state: dict) -> Llama:
    """A Llama that has these tensors, as they are, for its weights."""
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def in_one_piece(policy: Llama, device="cpu", keep: bool = True) -> Any:
    """The policy itself where it is not spread over processes, else a whole copy on the device.

    All processes take part; those that do not `keep` it get None and hold one tensor at a time.
    """
    if not is_sharded(policy):
        return policy
    state = whole({name: p.detach() for name, p in policy.named_parameters()}, device, keep)
    return assemble(policy.config, state) if keep else None


def save_model(model: Llama, folder: str | Path, bos: int | None = None, eos: int | None = None):
    """Write config.json and model.safetensors that transformers, vLLM and llama.cpp read.

    bos and eos are ids for config.json; where the folder that the weights came from named its own,
    those stay, and so does its generation_config.json. The tokenizer saves its files itself.
    """
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    shape = asdict(model.config)
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None}
    shape["kept"] = ids | shape["kept"]
    hub.write_folder(Path(folder), shape, state)
