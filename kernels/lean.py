"""The policy's layers on a CPU, with gradients: few tensors wait for the backward pass.

In: activations in the weights' own type. Out: the values and gradients of PyTorch's operations, to
the last bit, since they are the same operations in the same order. What a product reads (a norm's
output, the gated features) is not kept beside what it is made of but computed again, which takes a
hundredth of the products' time. Autograd keeps 5.5 numbers of width d and 4 of width d_ff more for
each token and layer. On a GPU that is torch.compile's business (--compile=True), which does alike.
"""

import torch
from torch import nn
from torch.nn import functional as F


def normed(norm, linears, x) -> tuple:
    """linear(norm(x)) for each linear; x [B, T, d]."""
    if not (lean(x) and isinstance(norm, nn.RMSNorm)):
        h = norm(x)
        return tuple(linear(h) for linear in linears)
    weights = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return _Normed.apply(x, x, norm.weight, norm.eps, *weights)


def gated(gate, up, down):
    """down(silu(gate) * up); gate, up [B, T, d_ff], down a linear layer without a bias."""
    return _Gated.apply(gate, up, down.weight) if lean(gate) else down(F.silu(gate) * up)


def lean(x) -> bool:
    ours = x.device.type == "cpu" and torch.is_grad_enabled()
    return ours and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


class _Normed(torch.autograd.Function):
    """Takes x twice: its two gradients are added one after the other, as autograd adds them."""

    @staticmethod
    def forward(ctx, x, same, weight, eps, *weights):
        inverse = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # of the root: [B, T, 1]
        h = (x * inverse).mul_(weight)
        ctx.save_for_backward(x, inverse, weight, *weights)
        return tuple(F.linear(h, *pair) for pair in zip(weights[::2], weights[1::2], strict=True))

    @staticmethod
    def backward(ctx, *gradients):
        x, inverse, weight, *weights = ctx.saved_tensors
        z, dh, found = x * inverse, None, []
        h = (z * weight).flatten(0, -2)  # [B * T, d]
        for g, w, bias in zip(gradients[::-1], weights[-2::-2], weights[::-2], strict=True):
            g = g.flatten(0, -2)
            found[:0] = g.T @ h, None if bias is None else g.sum(0)
            dh = g @ w if dh is None else dh.add_(g @ w)
        dh = dh.view_as(x)
        dweight = z.mul_(dh).flatten(0, -2).sum(0)
        dh.mul_(weight)
        mean = (-0.5 * (dh * x).sum(-1, keepdim=True) * inverse.pow(3)).div_(x.shape[-1])
        return dh.mul_(inverse), mean.mul_(2) * x, dweight, None, *found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, g):
        gate, up, weight = ctx.saved_tensors
        activated, g = F.silu(gate), g.flatten(0, -2)
        dweight = g.T @ (activated * up).flatten(0, -2)
        product = (g @ weight).view_as(gate)
        dup = activated.mul_(product)
        torch.ops.aten.silu_backward.grad_input(product.mul_(up), gate, grad_input=product)
        return product, dup, dweight
