"""The sampler: cached as uncached, exact frequencies, the trainer's log-probabilities."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_model import ALL, tiny

import candidates
from config import Config
from evaluation.evaluate import continue_batch
from kernels.cpu_layers import fast_layers, supported
from model import Llama, ModelConfig
from rollout import PrefixCache, sample_rollouts, uniforms
from tools.bench import peak_gb

V, EOS = 23, 22
SHAPE = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, head_dim=8)


def peaked(**changes):
    """A model for which temperature and top-p matter."""
    model = Llama(ModelConfig(V, **(SHAPE | changes))).initialise(1)
    for p in model.parameters():
        p.data.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def model():
    return peaked()


def prefixes(B=3, P=7):
    rng = torch.Generator().manual_seed(2)
    prefix = torch.randint(V - 1, (B, P), generator=rng)
    pad = torch.tensor([0, 2, P - 1])[:B]
    return prefix.masked_fill(torch.arange(P) < pad[:, None], EOS), pad


def run(model, prefix, pad, K=4, N=12, seed=7, index=None, eos=EOS, **how):
    index = torch.arange(len(prefix)) if index is None else index
    return sample_rollouts(model, prefix, pad, K, N, eos=eos, seed=seed, index=index, **how)


@ALL
@torch.no_grad()
def test_cached_greedy_equals_uncached(shape):
    model, (prefix, pad) = peaked(**shape), prefixes()
    got = run(model, prefix, pad, K=2, temperature=0)
    for b in range(len(prefix)):
        row, zero, out = prefix[b, pad[b] :].tolist(), torch.zeros(1, dtype=torch.int32), []
        while len(out) < 12 and EOS not in out:
            hidden = model(torch.tensor([row + out]), zero, len(row + out), 0)
            out.append(model.lm_head(hidden)[0, -1].argmax().item())
        for k in range(2):
            assert got.tokens[b, k, : got.lengths[b, k]].tolist() == out


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"top_p": 0.5}, {"temperature": 0}])
def test_logprobs_equal_the_trainers(model, how):
    prefix, pad = prefixes()
    got = run(model, prefix, pad, **how)
    with torch.no_grad():
        temperature = how.get("temperature", 1.0) or 1.0
        again = model.logprobs(prefix, pad, got.tokens, got.lengths, temperature)
    assert torch.allclose(got.logprobs, again, atol=2e-5)
    assert (got.lengths < 12).any(), "no rollout stopped: the test would not see the mask"


@pytest.mark.parametrize("ends", [EOS, (EOS, 3, 5)])
def test_stops_at_every_end_of_text(model, ends):
    """The first that it meets, which counts; behind it the first that was named."""
    got = run(model, *prefixes(), K=16, eos=ends)
    known, met = {ends} if isinstance(ends, int) else set(ends), set()
    for row, length in zip(got.tokens.flatten(0, 1), got.lengths.flatten(), strict=True):
        *text, last = row[:length].tolist()
        assert not known & set(text) and (row[length:] == EOS).all()
        assert length == 12 or last in known
        met |= {last} & known
    assert met == known, "too few rollouts to see them all"


def test_training_and_evaluation_stop_at_the_policys_own_ends(model):
    policy = copy.deepcopy(model)
    policy.config.kept, policy.config.generation = {"eos_token_id": 3}, {"eos_token_id": [5]}
    prefix, pad = prefixes()
    batch = SimpleNamespace(prefix=prefix, pad=pad, index=torch.arange(3))
    tokenizer = SimpleNamespace(eos=EOS, decode=list)
    drawn = candidates.rollouts(policy, batch, Config(rollouts=32, chunk=12), tokenizer).texts
    texts = [*sum(drawn, []), *continue_batch(policy, batch, tokenizer, 12)]
    assert not any({3, 5, EOS} & set(text[:-1]) for text in texts)
    assert {3, 5, EOS} <= {text[-1] for text in texts}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.7, 0.8)])
def test_frequencies_match_exact_probabilities(model, temperature, top_p):
    """Chi-square over two-token continuations of one prefix, 40,000 samples, exact expectation."""
    scipy_stats = pytest.importorskip("scipy.stats")
    prefix, pad = prefixes(1)
    K, B = 2000, 20
    how = dict(temperature=temperature, top_p=top_p)
    got = run(model, prefix.expand(B, -1), pad.expand(B), K, 2, **how)

    @torch.no_grad()
    def step(rows):
        hidden = model(rows, torch.zeros(len(rows), dtype=torch.int32), rows.shape[1], 0)
        p = (model.lm_head(hidden)[:, -1].double() / temperature).softmax(-1)
        ranked, order = p.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, order, ranked)
        return p / p.sum(-1, keepdim=True)

    first = step(prefix)[0]
    second = step(torch.cat((prefix.expand(V, -1), torch.arange(V)[:, None]), 1))
    second[EOS] = torch.eye(V, dtype=torch.double)[EOS]  # after a stop nothing but padding
    expected = (first[:, None] * second).flatten() * B * K
    pairs = got.tokens.flatten(0, 1)
    counts = torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).double()
    assert (counts[expected == 0] == 0).all(), "a token without probability was sampled"
    often = expected >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    chi2 = ((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    assert scipy_stats.chi2.sf(chi2, df=len(wanted) - 1) > 1e-3


def test_result_does_not_depend_on_the_batch(model, monkeypatch):
    prefix, pad = prefixes()
    index = torch.tensor([5, 900, 31])
    together = run(model, prefix, pad, K=6, index=index)
    for b in range(3):
        row = prefix[b : b + 1, pad[b] :]  # alone, and without its padding
        alone = run(model, row, torch.zeros(1, dtype=torch.int64), K=3, index=index[b : b + 1])
        assert torch.equal(alone.tokens[0], together.tokens[b, :3])
    other_seed = run(model, prefix, pad, K=6, index=index, seed=8)
    assert not torch.equal(other_seed.tokens, together.tokens)
    monkeypatch.setattr("rollout.prefixes_at_once", lambda *_: 2)  # what fits into memory
    in_turns = run(model, prefix, pad, K=6, index=index)
    assert torch.equal(in_turns.tokens, together.tokens)
    assert torch.equal(in_turns.lengths, together.lengths)


def test_memory_is_that_of_the_prefix_and_its_continuations():
    """16 rollouts, shorter together than the prefix: at most 1.15 times the cache, and weights."""
    shape = ModelConfig(64, n_layer=8, n_head=4, n_kv_head=4, d_model=128, d_ff=512, head_dim=32)
    model, B, P, K, N = Llama(shape).initialise(0), 2, 512, 16, 16
    weights = sum(p.nbytes for p in model.parameters() if p.dim() > 1)
    prefix, pad = torch.randint(64, (B, P)), torch.zeros(B, dtype=torch.int32)
    how = dict(eos=-1, seed=0, index=torch.arange(B))
    peak = 1e9 * peak_gb(lambda: sample_rollouts(model, prefix, pad, K, N, **how))
    cache = B * (P + K * N) * 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * 4
    assert cache < peak < 1.15 * cache + weights


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [300, 20])
def test_fast_layers_compute_the_same(dtype, shape, T):
    """On layers large enough for them, of many rows and of few."""
    model = tiny(n_kv_head=2, d_model=256, d_ff=512, head_dim=64, **shape)
    tokens = torch.randint(101, (2, T), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def hidden():
        return model(tokens, torch.tensor([0, 9]), T, 0)

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = hidden()
        with fast_layers(model):
            if supported(dtype):
                assert "before" in vars(model.model.layers[0])
            fast = hidden()
        assert torch.equal(hidden(), plain), "they left something behind"
    error = (fast - plain)[:, 9:].abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.1), error


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(3, torch.arange(64), 16, 64).double()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001
    for axis in range(3):  # neighbours along rows, rollouts and positions
        a, b = u.narrow(axis, 0, u.shape[axis] - 1), u.narrow(axis, 1, u.shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.02
    assert torch.equal(u[5:6], uniforms(3, torch.tensor([5]), 16, 64).double())
    largest = uniforms(0, torch.tensor([13297]), 1, 16)[0, 0, 15]  # all of its bits are ones
    assert 1 - 1e-6 < largest < 1
    one, other = (set(uniforms(seed, torch.arange(64), 1, 1).flatten().tolist()) for seed in (0, 1))
    assert len(one & other) < 3  # of 64 among 8 million: seeds share nothing


@torch.no_grad()
def test_nothing_keeps_the_caches_alive(model):
    """The caches go with the last reference, not with some later garbage collection."""
    decoder = PrefixCache(model, *prefixes(), 2, 3)
    decoder.step(torch.zeros(3, 2, dtype=torch.int64))
    gc.disable()
    held = weakref.ref(decoder)
    del decoder
    gc.enable()
    assert held() is None
