"""The Triton kernels against float64: in Triton's interpreter, or compiled on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/kernels_interpreted.py    as test_kernels.py does it
    python -m pytest -n 8 tests/kernels_interpreted.py                  on a computer with a GPU

Every uninitialised tensor is filled with nan here, so what a kernel fails to write shows.  Errors
are relative to the largest magnitude: float32 1e-5, float16 5e-3 and bfloat16 2e-2 (their epsilons
are 1e-3 and 8e-3).  In the interpreter most cases use small tiles, so that small problems have
edges; on a GPU, and where the name says so, the shipped ones.
"""

import kernels_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import attention, logprob

GPU = "cuda" if not kernels.INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16] if kernels.INTERPRETED else [torch.bfloat16, torch.float16]
SMALL = {kernel: dict.fromkeys((64, 128), (16, 32, 4, 1)) for kernel in attention.CONFIGS["sm_80"]}
SMALL["backward_key"] = dict.fromkeys((64, 128), (32, 16, 4, 1))
SMALL_LOGPROB = {kernel: (16, 32, 16, 4, 1) for kernel in logprob.CONFIGS["sm_80"]}


def there(*values):
    """Tensors where the kernels run, leaves of their own; all else as it is."""
    return [
        x.detach().to(GPU).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
        for x in values
    ]


@pytest.fixture(autouse=True, scope="module")
def poison():
    torch.use_deterministic_algorithms(True, warn_only=True)  # no word about the library's sums
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if kernels.INTERPRETED and "shipped" not in request.node.name:
        monkeypatch.setitem(attention.CONFIGS, "sm_80", SMALL)
        monkeypatch.setitem(logprob.CONFIGS, "sm_80", SMALL_LOGPROB)
    if "shipped" not in request.node.name:
        monkeypatch.setattr(logprob, "WORKSPACE", 1000)


def check_attention(shape, D, dtype, seed=0):
    *_, P, N, C = shape
    exact = reference.rows(*shape, D, dtype, seed=seed)
    *qkv, pad = there(*exact)
    out = attention.prefix_attention(*qkv, pad, P, N)
    expected = reference.attention(*exact, P, N)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grads = torch.autograd.grad(out, qkv, upstream.to(GPU))
    true = torch.autograd.grad(expected, exact[:3], upstream.double())
    for a, b in zip((out, *grads), (expected, *true), strict=True):
        assert reference.error(a, b) < TOLERANCE[dtype]
    dead = torch.arange(P + C * N) < exact[3][:, None]  # [B, T]
    for x in (out, *grads):
        assert not x.cpu().transpose(1, 2)[dead].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, D",  # B, H, Hkv, P, N, C
    [
        ((2, 1, 1, 40, 0, 0), 64),
        ((1, 4, 1, 37, 20, 1), 80),  # a head dimension that is padded
        ((1, 2, 1, 37, 20, 3), 128),
        ((1, 8, 1, 9, 2, 16), 24),
        ((2, 5, 1, 20, 1, 3), 64),
        ((1, 2, 2, 0, 21, 3), 64),
    ],
)
def test_attention(shape, D, dtype):
    check_attention(shape, D, dtype)


def test_attention_shipped_tiles():
    check_attention((1, 1, 1, 200, 70, 2), 64, DTYPES[0])
    check_attention((1, 1, 1, 140, 40, 3), 128, torch.float16)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    P=st.integers(0, 70), N=st.integers(1, 40), C=st.integers(0, 4), Hkv=st.integers(1, 2),
    G=st.sampled_from([1, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_drawn_shapes(P, N, C, Hkv, G, seed):
    if P + C:
        check_attention((2, Hkv * G, Hkv, P, N, C), 64, DTYPES[0], seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, D",  # B, K, H, Hkv, P, N
    [
        ((3, 2, 4, 1, 75, 40), 64),
        ((2, 5, 8, 1, 9, 5), 128),
        ((2, 2, 2, 2, 0, 3), 24),
        ((2, 1, 20, 1, 33, 3), 64),  # more query heads a kv head than a tile has rows
        ((1, 1, 35, 1, 1, 1), 80),
    ],
)
def test_decode(shape, D, dtype):
    exact = reference.caches(*shape, D, dtype)
    inputs = there(*exact)
    for filled in (1, shape[-1]):
        count = torch.tensor([filled], dtype=torch.int32, device=GPU)
        out = attention.decode_attention(*inputs, count)
        assert reference.error(out, reference.decode(*exact, filled)) < TOLERANCE[dtype]
        plain = attention.decode_attention_torch(*inputs, count)  # on a GPU it masks
        assert reference.error(plain, reference.decode(*exact, filled)) < TOLERANCE[dtype]


def test_decode_shipped_tiles():
    exact = reference.caches(2, 16, 8, 1, 300, 70, 64, DTYPES[0])
    out = attention.decode_attention(*there(*exact), 70)
    assert reference.error(out, reference.decode(*exact, 70)) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, d, V", [(21, 48, 300), (1, 40, 97), pytest.param(130, 96, 1030, id="shipped")]
)
def test_logprob(T, d, V, dtype):
    generator = torch.Generator().manual_seed(T)
    draw = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
    hidden, weight = (draw(n, d).to(dtype).requires_grad_() for n in (T, V))
    targets, upstream = torch.randint(V, (T,), generator=generator), draw(T)
    targets[-1], targets[T // 2] = V - 1, V - 1 if T == 1 else -100
    given = there(hidden, weight, targets)
    ours = logprob.linear_logprob(*given, 0.7)
    true = reference.logprob(hidden, weight, targets, 0.7)
    assert reference.error(ours, true) < 1e-5  # float32 throughout, whatever the input
    grads = torch.autograd.grad((ours * upstream.to(GPU)).sum(), given[:2])
    exact = torch.autograd.grad((true * upstream).sum(), (hidden, weight))
    for a, b in zip(grads, exact, strict=True):
        assert reference.error(a, b) < TOLERANCE[dtype]


def use_all_of(module, dtype) -> float:
    """Every kernel of the module by its public name: the largest error against float64."""
    if module is logprob:
        given = *(torch.randn(n, 32).to(dtype) for n in (5, 70)), torch.arange(5)
        value = logprob.linear_logprob(*there(*given))
        return reference.error(value, reference.logprob(*given, 1.0))
    rows = reference.rows(1, 1, 1, 9, 4, 2, 64, dtype)
    caches = reference.caches(1, 3, 1, 1, 9, 4, 64, dtype)
    values = attention.prefix_attention(*there(*rows), 9, 4)
    decoded = attention.decode_attention(*there(*caches), 3)
    exact = reference.attention(*rows, 9, 4), reference.decode(*caches, 3)
    return max(map(reference.error, (values, decoded), exact))


def broken_by(fault: str, whole):
    """A kernel's operator as a compiler or a driver may spoil it."""

    def operator(*args):
        if fault == "no kernel image":
            raise RuntimeError("no kernel image is available")
        factor = {"whole": 1.0, "differs": 1.2, "by nan": torch.nan}[fault]
        found = whole(*args)
        return tuple(x * factor for x in found) if isinstance(found, tuple) else found * factor

    return operator


@pytest.mark.parametrize(
    "module, name, fault",
    [
        (attention, "_attention", "whole"),
        (attention, "_attention_backward", "differs"),
        (attention, "_decode", "by nan"),
        (logprob, "_logprob", "no kernel image"),
        (logprob, "_logprob_grad", "differs"),
    ],
)
def test_first_use_checks_itself_with_shipped_tiles(module, name, fault, monkeypatch, capfd):
    """A kernel that does not compute what its definition does is named once and replaced."""
    monkeypatch.setattr(kernels, "SELF_CHECK", True)
    monkeypatch.setattr(kernels, "_verdicts", {})
    monkeypatch.setattr(module, name, broken_by(fault, getattr(module, name)))
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        assert use_all_of(module, DTYPES[1]) < TOLERANCE[DTYPES[1]]
        states.append(torch.get_rng_state())
    assert torch.equal(*states)  # the check draws nothing from the run's random numbers
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kernels: ")]
    assert len(said) == (fault != "whole")
    assert sum(kernels._verdicts.values()) == (module is attention) + (fault == "whole")
    assert all("PyTorch computes instead" in line and fault in line for line in said)


def test_what_the_kernels_do_not_take(monkeypatch, capfd):
    """Heads of more than 128 numbers: one line, and the definition; never a wrong result."""
    exact = reference.rows(1, 1, 1, 4, 0, 0, 160, DTYPES[1])
    monkeypatch.setattr(kernels, "SELF_CHECK", True)
    out = attention.prefix_attention(*there(*exact), 4, 0)
    assert reference.error(out, reference.attention(*exact, 4, 0)) < TOLERANCE[DTYPES[1]]
    assert "head dimension 160: the kernels take at most 128" in capfd.readouterr().err
