"""The Triton kernels in Triton's interpreter (TRITON_INTERPRET=1); test_kernels.py runs this file.

Every uninitialised tensor is filled with nan here, so what a kernel fails to write shows.
Errors are relative to the largest magnitude: float32 1e-5, float16 5e-3 (its epsilon is 1e-3).
Most cases use small tiles, so that small problems have edges; one each runs the shipped ones.
"""

import kernels_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention, logprob

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
SMALL = {kernel: (16, 32, 4, 1) for kernel in attention.CONFIGS["sm_80"]}
SMALL |= {(kernel, D): (32, 16, 4, 1) for kernel, D in SMALL if kernel == "backward_key"}
SMALL_LOGPROB = {kernel: (16, 32, 16, 4, 1) for kernel in logprob.CONFIGS["sm_80"]}


@pytest.fixture(autouse=True, scope="module")
def poison():
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if "shipped" not in request.node.name:
        monkeypatch.setitem(attention.CONFIGS, "sm_80", SMALL)
        monkeypatch.setitem(logprob.CONFIGS, "sm_80", SMALL_LOGPROB)
        monkeypatch.setattr(logprob, "WORKSPACE", 1000)


def check_attention(shape, D, dtype, seed=0):
    *_, P, N, C = shape
    q, k, v, pad = reference.rows(*shape, D, dtype, seed=seed)
    out = attention.prefix_attention(q, k, v, pad, P, N)
    expected = reference.attention(q, k, v, pad, P, N)
    assert reference.error(out, expected) < TOLERANCE[dtype]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for ours, theirs in zip(
        grads, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True
    ):
        assert reference.error(ours, theirs) < TOLERANCE[dtype]
    dead = torch.arange(P + C * N) < pad[:, None]  # [B, T]
    for x in (out, *grads):
        assert not x.transpose(1, 2)[dead].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape, D",  # B, H, Hkv, P, N, C
    [
        ((2, 1, 1, 40, 0, 0), 64),
        ((1, 4, 1, 37, 20, 1), 64),
        ((1, 2, 1, 37, 20, 3), 128),
        ((1, 8, 1, 9, 2, 16), 32),
        ((1, 2, 1, 20, 1, 3), 64),
        ((1, 2, 2, 0, 21, 3), 64),
    ],
)
def test_attention(shape, D, dtype):
    check_attention(shape, D, dtype)


def test_attention_shipped_tiles():
    check_attention((1, 1, 1, 200, 70, 2), 64, torch.float32)
    check_attention((1, 1, 1, 140, 40, 3), 128, torch.float16)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    P=st.integers(0, 70), N=st.integers(1, 40), C=st.integers(0, 4), Hkv=st.integers(1, 2),
    G=st.sampled_from([1, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_drawn_shapes(P, N, C, Hkv, G, seed):
    if P + C:
        check_attention((2, Hkv * G, Hkv, P, N, C), 64, torch.float32, seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape, D",  # B, K, H, Hkv, P, N
    [((3, 2, 4, 1, 75, 40), 64), ((2, 5, 8, 1, 9, 5), 128), ((2, 2, 2, 2, 0, 3), 32)],
)
def test_decode(shape, D, dtype):
    inputs = reference.caches(*shape, D, dtype)
    for filled in (1, shape[-1]):
        out = attention.decode_attention(*inputs, torch.tensor([filled], dtype=torch.int32))
        assert reference.error(out, reference.decode(*inputs, filled)) < TOLERANCE[dtype]


def test_decode_shipped_tiles():
    inputs = reference.caches(2, 16, 8, 1, 300, 70, 64)
    out = attention.decode_attention(*inputs, 70)
    assert reference.error(out, reference.decode(*inputs, 70)) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "T, d, V", [(21, 48, 300), (1, 40, 97), pytest.param(130, 96, 1030, id="shipped")]
)
def test_logprob(T, d, V, dtype):
    generator = torch.Generator().manual_seed(T)
    draw = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
    hidden, weight = (draw(n, d).to(dtype).requires_grad_() for n in (T, V))
    targets = torch.randint(V, (T,), generator=generator)
    targets[-1], targets[T // 2] = V - 1, V - 1 if T == 1 else -100
    upstream = draw(2, T)
    ours = logprob.linear_logprob(hidden, weight, targets, 0.7, entropy=True)
    theirs = reference.logprob(hidden, weight, targets, 0.7)
    plain = logprob.linear_logprob(hidden, weight, targets, 0.7)
    assert torch.equal(plain, ours[0])
    grads = []
    for pair in (ours, theirs):
        for a, b in zip(pair, theirs, strict=True):
            assert reference.error(a, b) < 1e-5  # float32 throughout, whatever the input
        loss = (torch.stack(pair) * upstream).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    only = torch.autograd.grad((plain * upstream[0]).sum(), (hidden, weight))
    grads[0] += only
    grads[1] += torch.autograd.grad((theirs[0] * upstream[0]).sum(), (hidden, weight))
    for a, b in zip(*grads, strict=True):
        assert reference.error(a, b) < TOLERANCE[dtype]


def test_operators_are_whole_for_the_compiler():
    """Schema, fake tensors and autograd registration; no graph break; the same numbers."""
    q, k, v, pad = reference.rows(1, 2, 1, 9, 4, 2, 64)
    torch.library.opcheck(torch.ops.nanosip.prefix_attention, (q, k, v, pad, 9, 4, 0.125))
    decode = reference.caches(1, 2, 2, 1, 9, 4, 64)
    torch.library.opcheck(
        torch.ops.nanosip.decode_attention, (*decode, torch.ones(1, dtype=torch.int32), 0.125)
    )
    hidden, weight = torch.randn(5, 32).requires_grad_(), torch.randn(70, 32).requires_grad_()
    targets = torch.arange(5)
    torch.library.opcheck(
        torch.ops.nanosip.linear_logprob, (hidden, weight, targets, 0.7, True), rtol=1e-4, atol=1e-5
    )
    whole = torch.compile(attention.prefix_attention, fullgraph=True, backend="aot_eager")
    out = whole(q, k, v, pad, 9, 4)
    eager = attention.prefix_attention(q, k, v, pad, 9, 4)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), q), torch.autograd.grad(eager.sum(), q)
    )


def test_bfloat16_is_refused():
    q, k, v, pad = reference.rows(1, 1, 1, 4, 0, 0, 64, torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        attention.prefix_attention(q, k, v, pad, 4, 0)


def test_head_dimension_is_limited():
    q, k, v, pad = reference.rows(1, 1, 1, 4, 0, 0, 160)
    with pytest.raises(ValueError, match="160"):
        attention.prefix_attention(q, k, v, pad, 4, 0)
