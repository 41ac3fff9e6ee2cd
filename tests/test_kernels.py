"""The PyTorch definitions against float64, and the Triton kernels against it in the interpreter.

The interpreter is chosen when a process first imports the kernels, so its cases
(kernels_interpreted.py) run in a process of their own.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import kernels_reference as reference
import pytest
import torch
from torch.nn.attention import SDPBackend

from kernels.attention import decode_attention, prefix_attention
from kernels.logprob import linear_logprob
from support.command import ROOT
from tools import bench

SHAPES = [  # B, H, Hkv, P, N, C
    (2, 4, 4, 13, 5, 0),
    (3, 8, 2, 13, 5, 3),
    (2, 8, 1, 9, 4, 16),
    (2, 2, 2, 0, 7, 3),
    (2, 4, 2, 8, 1, 3),
    (1, 2, 1, 6, 0, 0),
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_definition(shape, ragged):
    *_, P, N, C = shape
    q, k, v, pad = reference.rows(*shape, D=8, ragged=ragged)
    out = prefix_attention(q, k, v, pad, P, N)
    expected = reference.attention(q, k, v, pad, P, N)
    assert reference.error(out, expected) < 2e-6
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    true = torch.autograd.grad(expected, (q, k, v), upstream.double())
    for ours, theirs in zip(grads, true, strict=True):
        assert reference.error(ours, theirs) < 5e-6


@pytest.mark.parametrize("shape", [(3, 4, 4, 2, 11, 6), (2, 16, 8, 1, 5, 3), (2, 2, 3, 3, 0, 4)])
def test_decode_definition(shape):
    inputs = reference.caches(*shape, D=8)
    for filled in (1, shape[-1]):
        out = decode_attention(*inputs, filled)
        assert reference.error(out, reference.decode(*inputs, filled)) < 2e-6
        assert torch.equal(out, decode_attention(*inputs, torch.tensor([filled])))


def test_decoding_repeats_training():
    """The last token of each continuation gets from its caches what it gets in the row."""
    B, H, Hkv, P, N, C, D = 2, 4, 2, 7, 5, 3, 8
    *qkv, pad = reference.rows(B, H, Hkv, P, N, C, D)
    q, k, v = (x.detach() for x in qkv)
    row = prefix_attention(q, k, v, pad, P, N)[:, :, P:].unflatten(2, (C, N))[:, :, :, -1]
    own = [x[:, :, P:].unflatten(2, (C, N)).transpose(1, 2) for x in (k, v)]  # [B, C, Hkv, N, D]
    last = q[:, :, P:].unflatten(2, (C, N))[:, :, :, -1].transpose(1, 2)  # [B, C, H, D]
    out = decode_attention(last, k[:, :, :P], v[:, :, :P], pad, *own, N)
    torch.testing.assert_close(out, row.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_definition(temperature, monkeypatch):
    monkeypatch.setattr("kernels.logprob.SLICE", 1000)  # several slices, the last one short
    hidden, weight = torch.randn(9, 16).requires_grad_(), torch.randn(700, 16).requires_grad_()
    targets = torch.randint(700, (9,))
    targets[2], targets[4] = -100, 699
    upstream = torch.randn(9)
    ours = linear_logprob(hidden, weight, targets, temperature)
    theirs = reference.logprob(hidden, weight, targets, temperature)
    assert ours[2] == 0 and reference.error(ours, theirs) < 5e-6
    grads = [torch.autograd.grad((x * upstream).sum(), (hidden, weight)) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert reference.error(a, b) < 1e-5
    assert not grads[0][0][2].any()
    assert not linear_logprob(hidden, weight, torch.full((9,), -100), temperature).any()


def test_logprob_memory():
    """Beyond the gradients, at most 1/20 of the two [T, V] that log_softmax and backward keep."""
    T, d, V = 512, 16, 128_256
    hidden, weight = (torch.randn(n, d).requires_grad_() for n in (T, V))

    def run():
        torch.autograd.grad(linear_logprob(hidden, weight, torch.arange(T)).sum(), (hidden, weight))

    assert bench.peak_gb(run) * 1e9 - 4 * V * d < 2 * 4 * T * V / 20


def test_bench_kernels_and_its_peers(monkeypatch):
    """The code that a GPU runs; peers that need one are played by the definitions."""

    def flash(q, k, v, causal):  # [B, T, H, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return bench.sdpa(SDPBackend.MATH, q, k, v).transpose(1, 2), None

    def liger(*given, reduction):
        return -bench.all_logits(*given)

    for name in ("flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=flash))
    functional = SimpleNamespace(liger_fused_linear_cross_entropy=liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    rows = [row for group in bench.kernels() for row in group if "side" in row]
    assert sum(row["side"] == "ours" for row in rows) == 7 and len(rows) == 34
    failed = {row["side"].partition(":")[0] for row in rows if "error" not in row}
    assert failed == {f"FlexAttention {name}, same mask" for name in ("TRITON", "FLASH")}
    assert all(row["error"] < 1e-5 and row["share"] > 0 for row in rows if "error" in row)
    q, k, v = (x.detach() for x in reference.rows(1, 2, 2, 9, 4, 3, 8, ragged=False)[:3])
    flex = bench.flex_attention("TRITON", 9, 4, 21)(q, k, v)  # forward works on a CPU
    torch.testing.assert_close(flex, prefix_attention(q, k, v, torch.zeros(1), 9, 4))


def test_bench_step_and_its_forecast():
    step, agreement, *decoding = (row for group in bench.step() for row in group)
    assert abs(step["peak_gb"] / step["forecast_gb"] - 1) < 0.15 and step["update"] > 0
    assert agreement["most"] < 1e-4 and len(decoding) == 2


def test_bench_outlives_a_peer_and_knows_the_time(tmp_path, monkeypatch, capsys):
    # a peer that fails loses its own row, and a failure of ours is not hidden
    sides = {"ours": lambda: None, "broken": lambda: 1 / 0, "last": lambda: None}
    found = [row["side"] for row in bench.in_turns("x", sides)]
    assert found == ["ours", "broken: ZeroDivisionError 'division by zero'", "last"]
    with pytest.raises(ZeroDivisionError):
        list(bench.in_turns("x", {"ours": sides["broken"]}))
    monkeypatch.chdir(tmp_path)
    bench.main(["kernels", "--minutes", "0"])
    assert "the rest is left out" in capsys.readouterr().out


def test_triton_is_optional():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels.attention as a, kernels.logprob\n"
        "x = torch.randn(1, 2, 5, 8)\n"
        "a.prefix_attention(x, x, x, torch.zeros(1, dtype=torch.int32), 5, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(
    not importlib.util.find_spec("triton")
    or tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 4),
    reason="needs Triton 3.4: the interpreter of 3.2 cannot multiply by a transposed block",
)
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "tests/kernels_interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_logprob_is_float32_under_autocast():
    """--dtype=bfloat16: bfloat16 hidden states, float32 weights; on a CPU float32 arithmetic."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=rng).bfloat16()
    weight = torch.randn(11, 8, generator=rng)
    targets = torch.tensor([0, 3, -100, 10, 5, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(hidden, weight, targets)
    assert torch.equal(found, linear_logprob(hidden, weight, targets))
