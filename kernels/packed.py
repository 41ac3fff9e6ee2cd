"""The policy's layers on an x86 CPU, without gradients: weights packed for oneDNN, few operations.

In: a model.Llama, of which nothing is imported. Out: within `packed_weights` it computes the same
by other means. A token's decoding step multiplies few rows with all weights, so that reading these
and starting each operation take most of its time: packed, a product of 16 rows runs 1.5 times as
fast, and q, k and v are one product, the activation and the gate part of another.
"""

import contextlib
import math

import torch
from torch import nn


class PackedLinear:
    """x [..., in] -> x @ weight.T + bias [..., out], in the packing's type; weight [out, in]."""

    def __init__(self, weight, dtype: torch.dtype, bias=None):
        self.dtype, self.bias = dtype, None if bias is None else bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 64)

    def __call__(self, x, activation: str = "none"):
        product = torch.ops.mkldnn._linear_pointwise
        return product(x.to(self.dtype), self.weight, self.bias, activation, [], "")

    def times(self, x, factor):
        """The product, multiplied by factor [..., out] elementwise."""
        product = torch.ops.mkldnn._linear_pointwise.binary
        return product(x.to(self.dtype), factor, self.weight, None, "mul")


class PackedNorm:
    """nn.RMSNorm in four operations instead of eight."""

    def __init__(self, norm: nn.RMSNorm):
        d = norm.weight.numel()
        self.weight = norm.weight.detach().float() * math.sqrt(d)
        self.floor = torch.tensor(math.sqrt(d * (norm.eps or 0.0)))

    def __call__(self, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x / torch.hypot(size, self.floor) * self.weight


class PackedBlock:
    """`before` and `after` of a model.Block."""

    def __init__(self, block, dtype: torch.dtype):
        a, mlp = block.self_attn, block.mlp
        inputs = a.q_proj, a.k_proj, a.v_proj
        self.heads = [p.out_features // a.head_dim for p in inputs]
        self.head_dim, self.rotate = a.head_dim, a.rotate
        bias = None if a.q_proj.bias is None else torch.cat([p.bias for p in inputs])
        self.qkv = PackedLinear(torch.cat([p.weight for p in inputs]), dtype, bias)
        weights = a.o_proj.weight, *(p.weight for p in mlp.children())
        self.o, self.gate, self.up, self.down = (PackedLinear(w, dtype) for w in weights)
        self.qk_norms = [PackedNorm(norm) for norm in (a.q_norm, a.k_norm) if norm is not None]
        self.norms = [PackedNorm(n) if isinstance(n, nn.RMSNorm) else n for n in block.norms]

    def before(self, x, cos, sin):
        """x [B, T, d] -> q [B, H, T, D], k, v [B, Hkv, T, D]."""
        # One product for all: [B, T, (H + 2 * Hkv) * D], as [B, H + 2 * Hkv, T, D].
        z = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = self.heads
        for norm, part in zip(self.qk_norms, (z[:, :, :q], z[:, :, q : q + k]), strict=False):
            wide = part.flatten(-2).unflatten(-1, (-1, norm.weight.numel()))  # views, both
            wide.copy_(norm(wide))
        z = z.transpose(1, 2)
        rotated = self.rotate(z[:, : q + k], cos, sin)  # [B, H + Hkv, T, D]
        return rotated[:, :q], rotated[:, q:], z[:, q + k :]

    def after(self, x, attended):
        """x [B, T, d], attended [B, T, H * D] -> [B, T, d]."""
        _, behind_attention, before, behind = self.norms
        x = x + behind_attention(self.o(attended))
        for part in x.flatten(0, 1).split(512):  # so that no wide tensor holds all tokens
            h = before(part)
            part += behind(self.down(self.up.times(h, self.gate(h, "swish"))))
        return x


@contextlib.contextmanager
def packed_weights(model):
    """Within, the model computes without gradients on packed copies of its weights, where the CPU
    can and its layers are not so small that packing costs more than it saves."""
    dtype = model.compute_dtype
    can = model.lm_head.weight.device.type == "cpu" and packs(dtype)
    blocks = [b for b in model.model.layers if can and b.mlp.gate_proj.weight.numel() >= 1 << 17]
    packed = [PackedBlock(block, dtype) for block in blocks]
    head = PackedLinear(model.lm_head.weight, dtype) if blocks else None
    try:
        for block, fast in zip(blocks, packed, strict=True):
            block.before, block.after = fast.before, fast.after
            model.lm_head.forward = head
        yield
    finally:
        for module in (*blocks, model.lm_head):  # what was set hides what the class defines
            for name in ("before", "after", "forward"):
                vars(module).pop(name, None)


def packs(dtype: torch.dtype) -> bool:
    """Whether this CPU has oneDNN's packed product in a type: x86, for bfloat16 with AVX-512."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bf16
