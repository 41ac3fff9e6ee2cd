"""The policy's layers on an x86 CPU, without gradients: products for few rows, few operations.

In: a model.Llama, of which nothing is imported. Out: within `fast_layers` it computes the same by
other means. A decoding step multiplies few rows with all weights. oneDNN streams a product's left
factor as it lies in memory and packs the right one, so here the weights stand on the left.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

FEW = 64  # rows up to which the weights stand on the left


class FastLinear:
    """x [..., in] -> x @ weight.T + bias [..., out], in the given type; weight [out, in]. Of few
    rows the result lies in memory with the rows side by side, as the next product wants it."""

    def __init__(self, weight, dtype: torch.dtype, bias=None):
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x):
        x, product = x.to(self.weight.dtype), torch.ops.mkldnn._linear_pointwise  # x, w: x @ w.T
        if x[..., 0].numel() > FEW:
            return F.linear(x, self.weight, self.bias)
        y = product(self.weight, x.flatten(0, -2), None, "none", [], "").T  # [R, out]
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


class FastNorm:
    """nn.RMSNorm in four operations instead of eight."""

    def __init__(self, norm: nn.RMSNorm):
        d = norm.weight.numel()
        self.weight = norm.weight.detach().float() * math.sqrt(d)
        self.floor = torch.tensor(math.sqrt(d * (norm.eps or 0.0)))

    def __call__(self, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x / torch.hypot(size, self.floor) * self.weight


class FastBlock:
    """`before` and `after` of a model.Block."""

    def __init__(self, block, dtype: torch.dtype):
        a, mlp = block.self_attn, block.mlp
        inputs = a.q_proj, a.k_proj, a.v_proj
        self.heads = [p.out_features // a.head_dim for p in inputs]
        self.head_dim, self.rotate = a.head_dim, a.rotate
        bias = None if a.q_proj.bias is None else torch.cat([p.bias for p in inputs])
        self.qkv = FastLinear(torch.cat([p.weight for p in inputs]), dtype, bias)
        weights = a.o_proj.weight, *(p.weight for p in mlp.children())
        self.o, self.gate, self.up, self.down = (FastLinear(w, dtype) for w in weights)
        self.qk_norms = [FastNorm(norm) for norm in (a.q_norm, a.k_norm) if norm is not None]
        self.norms = [FastNorm(n) if isinstance(n, nn.RMSNorm) else n for n in block.norms]

    def before(self, x, cos, sin):
        """x [B, T, d] -> q [B, H, T, D], k, v [B, Hkv, T, D]."""
        # One product for all: [B, T, (H + 2 * Hkv) * D], as [B, H + 2 * Hkv, T, D].
        z = self.qkv(self.norms[0](x)).contiguous().unflatten(-1, (-1, self.head_dim))
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
        x = behind_attention(self.o(attended)) + x  # laid out as the first of them
        for part in x.flatten(0, 1).split(512):  # so that no wide tensor holds all tokens
            h = before(part)
            part += behind(self.down(F.silu(self.gate(h), inplace=True).mul_(self.up(h))))
        return x


@contextlib.contextmanager
def fast_layers(model):
    """Within, the model computes by this file's layers, where the CPU can and they are not tiny."""
    dtype = model.compute_dtype
    can = model.lm_head.weight.device.type == "cpu" and supported(dtype)
    blocks = [b for b in model.model.layers if can and b.mlp.gate_proj.weight.numel() >= 1 << 17]
    fast = [FastBlock(block, dtype) for block in blocks]
    head = FastLinear(model.lm_head.weight, dtype) if blocks else None
    try:
        for block, own in zip(blocks, fast, strict=True):
            block.before, block.after = own.before, own.after
            model.lm_head.forward = lambda x: head(x).contiguous()  # as sampling reads them
        yield
    finally:
        for module in (*blocks, model.lm_head):  # what was set hides what the class defines
            for name in ("before", "after", "forward"):
                vars(module).pop(name, None)


def supported(dtype: torch.dtype) -> bool:
    """Whether this CPU has oneDNN's product in a type: x86, for bfloat16 with AVX-512."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bf16
