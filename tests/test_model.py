"""The policy equals transformers' of every family, and sharing a prefix changes nothing."""

import shutil

import pytest
import torch

import model
from config import Config
from kernels import attention, lean
from model import Llama, ModelConfig, preset, save_model
from support.command import UserError
from support.hub import FAMILIES
from tools.cost import memory

VARIANTS = {family: dict(family=family, **differs) for family, (_, differs, _) in FAMILIES.items()}
VARIANTS["smollm3"] |= dict(rotates=[1, 0])
EVERYTHING = dict(qkv_bias=True, qk_norm="whole", norm_after=True, rotates=[0, 1])
ALL = pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
SHAPES = [dict(n_kv_head=2) | shape for shape in VARIANTS.values()]
SHAPES += [{}, *(dict(n_kv_head=1, head_dim=32) | VARIANTS[name] for name in ("llama", "qwen3"))]


def tiny(**changes) -> Llama:
    shape = dict(vocab_size=101, n_layer=2, n_head=4, n_kv_head=4, d_model=64, d_ff=96, head_dim=16)
    model = Llama(ModelConfig(**(shape | changes))).initialise(0)
    torch.manual_seed(0)
    for p in model.parameters():  # else biases were 0, and norms 1
        p.data += 0.1 * torch.randn_like(p) if p.dim() == 1 else 0
    return model


def layout(B=3, P=9, C=3, N=5, seed=0, V=101):
    rng = torch.Generator().manual_seed(seed)
    prefix = torch.randint(V, (B, P), generator=rng)
    pad = torch.tensor([0, 3, P - 1])[:B]
    return prefix, pad, torch.randint(V, (B, C, N), generator=rng)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.get("family"))
@pytest.mark.parametrize(("C", "N"), [(0, 5), (1, 1), (3, 5)])
def test_logits_and_logprobs_equal_transformers(C, N, shape, tmp_path):
    """Each continuation after its prefix as one text of its own (tests/test_hub.py: folders)."""
    transformers = pytest.importorskip("transformers")
    ours = tiny(**shape)
    for p in ours.parameters():  # large enough that every part of the model shows in the logits
        p.data.mul_(3.0)
    save_model(ours, tmp_path)
    how = dict(attn_implementation="eager", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    prefix, pad, continuations = layout(C=C, N=N)
    P, tokens = prefix.shape[1], torch.cat((prefix, continuations.flatten(1)), dim=1)
    with torch.no_grad():
        logits = ours.lm_head(ours(tokens, pad, P, N))
        logp = ours.logprobs(prefix, pad, continuations) if C else None
        for b in range(len(prefix)):
            row = prefix[b, pad[b] :]
            expected = theirs(row[None]).logits[0]
            assert torch.allclose(logits[b, pad[b] : P], expected, atol=1e-4, rtol=0)
            for c in range(C):
                expected = theirs(torch.cat((row, continuations[b, c]))[None]).logits[0, -N - 1 :]
                mine = logits[b, P + c * N : P + (c + 1) * N]
                assert torch.allclose(mine, expected[1:], atol=1e-4, rtol=0)
                of_tokens = expected[:-1].log_softmax(-1).gather(1, continuations[b, c][:, None])
                assert torch.allclose(logp[b, c], of_tokens[:, 0], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("error")  # norms of 16 bits by float32 weights warn, and are slow
@pytest.mark.parametrize("shape", [{}, EVERYTHING])
def test_under_autocast_the_kernels_get_16_bits(shape, monkeypatch):
    """On a GPU float32 inputs would go to the slow definitions without a word."""
    seen = {}

    def recorded(function):
        return lambda x, y, *rest: seen.update({function: x.dtype}) or function(x, y, *rest)

    kernels = [model.prefix_attention, model.linear_logprob]
    for function in kernels:
        monkeypatch.setattr(model, function.__name__, recorded(function))
    policy = tiny(**shape)
    with torch.autocast("cpu", torch.bfloat16):
        logp = policy.logprobs(*layout())
    logp.sum().backward()
    assert seen == dict.fromkeys(kernels, torch.bfloat16)
    assert {logp.dtype, *(p.grad.dtype for p in policy.parameters())} == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
@pytest.mark.parametrize(("recompute", "shape"), [(False, {}), (True, {}), (False, EVERYTHING)])
def test_compiled_layers_compute_the_same(recompute, shape):
    eager, compiled = tiny(n_kv_head=2, **shape), tiny(n_kv_head=2, **shape)
    compiled.compiled, compiled.recompute = True, recompute
    for shape in (dict(), dict(B=2, P=17, C=2, N=3)):
        logps = [model.logprobs(*layout(**shape)) for model in (eager, compiled)]
        assert torch.allclose(*logps, atol=1e-5, rtol=0)
        for logp in logps:
            logp.exp().sum().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-4)


@ALL
def test_on_a_cpu_less_is_kept_for_the_same_gradients(shape, monkeypatch):
    """To the last bit; OLMo 2, whose norms stand behind, saves in the MLP alone."""
    kept, found = [], []
    for step in range(3):
        if step == 0:
            monkeypatch.setattr(lean, "lean", lambda x: False)
        if step == 2:
            monkeypatch.setattr(attention, "KEPT", 0)
        policy, saved = tiny(n_kv_head=2, **shape), {}
        weights = {p.data_ptr() for p in policy.parameters()}

        def note(x, saved=saved):
            return saved.update({x.data_ptr(): x.numel()}) or x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logp = policy.logprobs(*layout())
        logp.square().sum().backward()
        found.append([logp, *(p.grad for p in policy.parameters())])
        kept.append(sum(size for at, size in saved.items() if at not in weights))
        monkeypatch.undo()
    for plain, *ours in zip(*found, strict=True):
        assert all(torch.equal(plain, each) for each in ours)
    assert kept[2] < kept[1] < (0.87 if shape.get("norm_after") else 0.7) * kept[0]
    grpo = dict(objective="grpo", candidates="rollouts", rollouts=3)  # of a layout's rows and sizes
    config = Config(**grpo, gpus=1, batch_size=3, chunk=5, max_seq=14, baseline=False)
    forecast = memory(config, policy.config, bf16=False)["activations of a micro-batch"]
    if not (shape.get("norm_after") or shape.get("qk_norm")):
        assert 4 * kept[1] == pytest.approx(forecast, rel=0.05)


@ALL
def test_shared_prefix_equals_separate_rows(shape):
    """Log-probabilities and gradients: C continuations of one prefix, or C rows of one each."""
    model = tiny(n_kv_head=2, **shape).double()
    prefix, pad, continuations = layout(C=4)
    lengths = torch.tensor([[5, 1, 3, 5], [2, 5, 5, 4], [5, 5, 1, 2]])
    B, C, N = continuations.shape
    shared = model.logprobs(prefix, pad, continuations, lengths, temperature=0.7)
    shared.square().sum().backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    rows = prefix.repeat_interleave(C, 0), pad.repeat_interleave(C, 0), continuations.view(-1, 1, N)
    separate = model.logprobs(*rows, lengths.view(-1, 1), temperature=0.7).view(B, C, N)
    assert torch.allclose(shared, separate, atol=1e-5)
    assert (shared[0, 1, 1:] == 0).all() and (shared[0, 0] < 0).all()
    separate.square().sum().backward()
    assert torch.allclose(gradient, model.model.embed_tokens.weight.grad, atol=1e-4)


def test_presets():
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in Llama(preset(name, V)).parameters())
            for name, V in (("llama-1.4b", 32000), ("smollm2-135m", 49152), ("world", 1000))
        }
    assert 1.3e9 < count["llama-1.4b"] < 1.45e9
    assert count["smollm2-135m"] == 134_515_008  # what its model card and safetensors count
    assert count["world"] < 1e6
    with pytest.raises(UserError, match="smollm2-135m"):
        preset("llama-9b", 10)
