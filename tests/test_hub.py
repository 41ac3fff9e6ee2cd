"""A model's folder is read as transformers reads it, or refused in one line."""

import contextlib
import json

import pytest
import torch
from hostile import places, spoilt, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from config import Config
from model import Llama, ModelConfig, initial_policy, load_model, read_config, save_model
from support import hub
from support.command import UserError

SHAPE = dict(vocab_size=96, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, head_dim=8)
HF = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
HF |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
HF |= dict(initializer_range=0.2, rms_norm_eps=1e-3)  # so that every part shows in the logits
HF |= dict(pad_token_id=None)
FAR = {"rope_type": "default", "rope_theta": 5e5}
NEAR = {"rope_type": "default", "rope_theta": 1e4}
OPEN = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 = OPEN | dict(original_max_position_embeddings=16, rope_theta=5e5)
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BIAS, OLD = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"
INDEX = "model.safetensors.index.json"
ABSENT = object()


@pytest.fixture
def small(tmp_path):
    """A folder as we save it."""
    save_model(Llama(ModelConfig(**SHAPE)).initialise(0), tmp_path)
    return tmp_path


def edit_config(folder, encoding="utf-8", **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    text = json.dumps({k: v for k, v in config.items() if v is not ABSENT})
    path.write_text(text, encoding=encoding)


def tensors(change, **how):
    """Replaces a folder's tensors by change(them), in one file."""

    def edit(folder):
        path = folder / "model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(change(state), path, **how)

    return edit


def half(state):
    return {name: t if t.dim() == 1 else t.bfloat16() for name, t in state.items()}


def index_of(weight_map, alone=True):
    def write(folder):
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def misled_index(folder):
    """transformers takes the shards' names from the index, and their contents from the shards."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert names[EMBED] != names[HEAD]
    index_of(names | {EMBED: names[HEAD], HEAD: names[EMBED]}, alone=False)(folder)


def case(spoil=None, shape=None, shards=None, family="llama", **changes):
    """What is done to a folder, its configuration, its shards' size, changes of its config.json."""
    return spoil, {"model_type": family, **HF, **(shape or {})}, shards, changes


def old(**changes):
    return case(rope_parameters=ABSENT, layer_types=ABSENT, **changes)


TIED = dict(tie_word_embeddings=True)
FULL, SLIDING = ["full_attention"] * 2, ["full_attention", "sliding_attention"]
EACH_SECOND = dict(no_rope_layers=ABSENT, no_rope_layer_interval=2, tie_word_embeddings=ABSENT)
ALIKE = {
    "plain": case(),
    "theta_new": case(rope_parameters=FAR),
    "theta_old": old(rope_theta=5e5, rope_scaling=None),
    "theta_in_rope_scaling": old(rope_scaling=FAR),
    "theta_twice": case(rope_parameters=FAR, rope_theta=1e4, rope_scaling=None),
    "theta_null": old(rope_theta=None),
    "theta_null_inside": case(rope_parameters=NEAR | {"rope_theta": None}),
    "rope_type_null": case(rope_parameters=NEAR | {"rope_type": None}),
    "rope_parameters_null": case(rope_parameters=None),
    "rope_scaling_goes_first": case(rope_parameters=NEAR, rope_scaling=FAR),
    "rope_scaling_empty": case(rope_parameters=FAR, rope_scaling={}),
    "llama3": case(rope_parameters=LLAMA3),
    "llama3_old": old(rope_scaling=LLAMA3 | {"type": "llama3"}, rope_theta=1e4),
    "llama3_integers": old(rope_scaling=LLAMA3 | dict(factor=8, low_freq_factor=1)),
    "llama3_window_missing": case(rope_parameters=OPEN, shape=dict(max_position_embeddings=16)),
    "llama3_window_outside": case(rope_parameters=LLAMA3, original_max_position_embeddings=64),
    "kv_heads_missing": case(shape=dict(num_key_value_heads=4), num_key_value_heads=ABSENT),
    "head_dim_missing": case(head_dim=ABSENT),
    "head_dim_null": case(head_dim=None),
    "head_dim_wide": case(shape=dict(head_dim=16)),
    "positions_null": case(max_position_embeddings=None),
    "eps_missing": case(shape=dict(rms_norm_eps=1e-6), rms_norm_eps=ABSENT),
    "swish": case(hidden_act="swish"),
    "biases_null": case(attention_bias=None, mlp_bias=None),
    "unknown_keys": case(pretraining_tp=2, use_cache=False, made_by={"x": [1]}),
    "dtype_of_another_kind": case(dtype="float16", torch_dtype="bfloat16"),
    "byte_order_mark": case(lambda folder: edit_config(folder, "utf-8-sig")),
    "stale_index": case(index_of({EMBED: "model-00001-of-00009.safetensors"}, alone=False)),
    "shards": case(shards="20KB"),
    "misled_index": case(misled_index, shards="20KB"),
    "tied": case(shape=TIED),
    "tied_missing": case(tie_word_embeddings=ABSENT),
    "tied_as_head": case(tensors(lambda s: s | {HEAD: s.pop(EMBED)}), shape=TIED),
    "tied_twice": case(tensors(lambda s: s | {HEAD: s[EMBED].clone()}), shape=TIED),
    "tied_but_different": case(tie_word_embeddings=True),
    "mixed_types": case(tensors(half)),
    "rotary_buffers": case(tensors(lambda s: s | {OLD: torch.ones(4)})),
    "no_metadata": case(tensors(dict, metadata=None)),
    "linear": case(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5)),
    "linear_old": old(rope_scaling=dict(type="linear", factor=4), rope_theta=5e5),
    "yarn": old(rope_scaling=YARN, rope_theta=1e6),
    "yarn_window_missing": old(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "yarn_attention": old(rope_scaling=YARN | dict(attention_factor=1.5, truncate=True)),
    "yarn_betas": old(rope_scaling=YARN | dict(beta_fast=4, beta_slow=0.5, mscale=2.0)),
    "yarn_that_shrinks": old(rope_scaling=YARN | dict(factor=0.5)),
    "yarn_narrow": old(rope_scaling=YARN | dict(beta_fast=1e-4, beta_slow=1e-4)),
    "mistral": case(family="mistral"),
    "mistral_without_window": old(family="mistral", sliding_window=None, rope_theta=1e6),
    "mistral_window_missing": old(family="mistral", sliding_window=ABSENT, head_dim=None),
    "mistral_short_window": case(family="mistral", shape=dict(head_dim=16), sliding_window=40),
    "qwen2": case(family="qwen2", shape=TIED),
    "qwen2_old": old(family="qwen2", rope_theta=1e6, sliding_window=8, max_window_layers=0),
    "qwen2_short_window": old(family="qwen2", use_sliding_window=True, sliding_window=40),
    "qwen2_full": case(family="qwen2", use_sliding_window=True, sliding_window=8, layer_types=FULL),
    "qwen2_yarn": old(family="qwen2", rope_scaling=YARN, rope_theta=1e6),
    "qwen3": case(family="qwen3", shape=dict(head_dim=16)),
    "qwen3_old": old(family="qwen3", shape=dict(head_dim=16), rope_theta=1e6, attention_bias=False),
    "qwen3_head_dim_missing": case(family="qwen3", head_dim=ABSENT),
    "qwen3_yarn": old(family="qwen3", rope_scaling=YARN | {"rope_type": "yarn"}),
    "olmo2": case(family="olmo2"),
    "olmo2_old": old(family="olmo2", num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-3),
    "olmo2_eps_missing": case(family="olmo2", shape=dict(rms_norm_eps=1e-5), rms_norm_eps=ABSENT),
    "smollm3": case(family="smollm3", shape=dict(no_rope_layers=[0, 1])),
    "smollm3_interval": old(family="smollm3", shape=dict(num_hidden_layers=4), **EACH_SECOND),
    "smollm3_all_rotate": case(family="smollm3", no_rope_layers=[1, 1, 0], rope_theta=5e6),
    "smollm3_untied": case(family="smollm3", shape=dict(tie_word_embeddings=False)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_folder_gives_transformers_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    spoil, shape, shards, changes = ALIKE[name]
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_config(transformers.AutoConfig.for_model(**shape)).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.dim() == 1 else 0
    theirs.save_pretrained(tmp_path, max_shard_size=shards or "1GB")
    edit_config(tmp_path, **changes)
    if spoil:
        spoil(tmp_path)
    tokens = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(1))
    # Where transformers takes no null or byte order mark, they mean what was there before.
    with contextlib.suppress(Exception):
        read = auto.from_pretrained(tmp_path, dtype=torch.float32)
        read(tokens)  # before this, a null theta is not noticed
        theirs = read
    ours = load_model(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        mine = ours.lm_head(ours(tokens, torch.zeros(1, dtype=torch.int32), 40, 0))
        assert torch.allclose(mine, theirs(tokens).logits, atol=1e-4, rtol=0)
        save_model(ours, tmp_path / "again")
        back = auto.from_pretrained(tmp_path / "again")
        assert type(back) is type(theirs)
        assert torch.allclose(mine, back(tokens).logits, atol=1e-4, rtol=0)
    again = load_model(tmp_path / "again")
    assert again.config == ours.config
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def without(*names):
    return tensors(lambda s: {name: t for name, t in s.items() if name not in names})


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


# Values that are refused by the key's name, and forms of rope_scaling by other words.
KEYS: dict = dict(model_type=["gpt2", ABSENT, ["llama"], "qwen2_moe", "olmo3", "ministral"])
KEYS |= dict(hidden_act=["gelu"], attention_bias=[True], sliding_window=["16", 0])
KEYS |= dict(mlp_bias=[True], quantization_config=[{"bits": 4}])
KEYS |= dict(tie_word_embeddings=["false"], partial_rotary_factor=[0.5], rope_theta=[0])
KEYS |= dict(hidden_size=["large", ABSENT, 32.0, 10**30], num_hidden_layers=[2**30])
KEYS |= dict(vocab_size=[2**30], num_key_value_heads=[3], head_dim=[7], rope_scaling=[["llama3"]])
ROPES: dict = {"'dynamic' is not": {"rope_type": "dynamic", "factor": 4.0}}
ROPES |= {"factor must": {"type": "linear"}, "attention_factor": YARN | dict(attention_factor=-1)}
ROPES |= {"truncate": YARN | dict(truncate=False), "mscale_all_dim": YARN | dict(mscale_all_dim=1)}
ROPES |= {"one rule for all layers": {"full_attention": FAR}}
ROPES |= {"partial_rotary": {"rope_type": "default", "partial_rotary_factor": 0.5}}
ROPES |= {"factor must be": {"rope_type": "llama3", "factor": "x"}}
ROPES |= {"low_freq_factor": LLAMA3 | dict(low_freq_factor=4.0)}
LAYERS = [{"no_rope_layers": marks} for marks in ([1], 2)] + [{"no_rope_layer_interval": 0}]
SHARDS = "../x.safetensors", "/etc/x.safetensors", "..", "", "a\0.safetensors", 7, []
REFUSED: list = [  # changes of config.json, or what is done to the folder, and words of the refusal
    *(({key: value}, key) for key, refused in KEYS.items() for value in refused),
    *(({"rope_scaling": rope}, words) for words, rope in ROPES.items()),
    *(({"model_type": "smollm3", **wrong}, "no_rope_layer") for wrong in LAYERS),
    ({"model_type": "qwen2"}, "6 tensors are missing.*bias"),
    *((index_of({HEAD: name}), "no shard in the folder") for name in SHARDS),
    ({"intermediate_size": 97}, "shape"),
    ({"num_hidden_layers": 3}, "missing"),
    ({"num_hidden_layers": 1}, "too many"),
    (tensors(lambda s: s | {BIAS: torch.zeros(32)}), "too many.*bias"),
    (tensors(lambda s: s | {NORM: torch.ones(32, dtype=torch.int8)}), "floats"),
    (tensors(lambda s: s | {NORM: torch.ones(1, 32)}), "shape"),
    (without(HEAD), "missing.*lm_head"),
    (without(HEAD, EMBED), "missing.*lm_head"),
    (pickled, "save_pretrained"),
    (cut_off, "model.safetensors cannot be read"),
    (lambda folder: (folder / "adapter_config.json").touch(), "merge"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json cannot be"),
    (index_of({HEAD: "absent.safetensors"}), "absent.safetensors is missing"),
    (index_of(None), "no shard in the folder"),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED)
def test_what_would_be_computed_otherwise_is_one_clear_line(spoil, words, small):
    spoil(small) if callable(spoil) else edit_config(small, **spoil)
    with pytest.raises(UserError, match=words) as error:
        load_model(small)
    assert str(small) in str(error.value) and "\n" not in str(error.value)


READS: list = [  # tokens that see each other in every layer, of 64 positions
    (64, dict(model_type="mistral", sliding_window=None)),
    (64, dict(model_type="mistral")),  # 4,096 where it says nothing
    (64, dict(model_type="mistral", sliding_window=64)),
    (16, dict(model_type="mistral", sliding_window=16, use_sliding_window=False)),
    (64, dict(model_type="qwen2", sliding_window=16, layer_types=SLIDING)),
    (64, dict(model_type="qwen2", sliding_window=16, use_sliding_window=False)),
    (64, dict(model_type="qwen3", sliding_window=None, use_sliding_window=True)),
    (64, dict(model_type="qwen3", sliding_window=16, use_sliding_window=True, layer_types=FULL)),
    (16, dict(model_type="qwen3", sliding_window=16, use_sliding_window=True, layer_types=SLIDING)),
    (16, dict(model_type="smollm3", sliding_window=16, use_sliding_window=True)),
    (16, dict(sliding_window=16)),
]
WHOLE = dict(model_type="smollm3", no_rope_layers=[0, 1], layer_types=SLIDING, rope_scaling=YARN)
WHOLE |= dict(sliding_window=16, use_sliding_window=True)


@pytest.mark.parametrize(("reads", "changes"), READS)
def test_no_more_is_read_than_a_sliding_window_shows(reads, changes, small):
    edit_config(small, max_position_embeddings=64, **changes)
    assert read_config(small).max_seq == reads
    if changes.get("model_type", "llama") in ("llama", "mistral"):  # which have the same tensors
        save_model(load_model(small), small)
        written = json.loads((small / "config.json").read_text())
        assert written["max_position_embeddings"] == 64 and changes.items() <= written.items()
        for size, words in ((reads, ""), (reads + 1, f"{reads} positions .*sliding_window")):
            config = Config(init_from=str(small), max_seq=size, chunk=4)
            with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
                initial_policy(config, 96, "cpu")


@pytest.mark.parametrize("changes", [{"rope_scaling": LLAMA3}, WHOLE], ids=["llama", "smollm3"])
def test_any_config_is_taken_or_refused_in_one_line(changes, small):
    """A model of it is never made: tests of refused sizes would need the memory."""
    edit_config(small, **changes)
    whole = changes | json.loads((small / "config.json").read_text())  # first what is unusual

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(list(places(whole))), values)
    def check(place, new):
        (small / "config.json").write_text(json.dumps(spoilt(whole, place, new)))
        try:
            config = read_config(small)
        except UserError as error:
            assert str(small) in str(error) and "\n" not in str(error) and len(str(error)) < 400
        else:
            assert 0 < config.n_layer < 1025 and 0 < config.d_model < 2**18 and config.head_dim > 0

    check()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_hinders_reading_for_a_moment_is_not_damage(name, small):
    """A folder in the file's place stands for any error of the system."""
    (small / name).unlink()
    (small / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        load_model(small)


def test_types_of_weights(small):
    """They are saved and loaded as they are; of several in one folder, as the widest."""
    for dtype in (torch.bfloat16, torch.float32):
        save_model(load_model(small, dtype=dtype), small)
        assert {p.dtype for p in load_model(small).parameters()} == {dtype}
    config, weights = ((small / name).stat() for name in ("config.json", "model.safetensors"))
    assert config.st_mode == weights.st_mode, "who may read the one may read the other"
    tensors(half)(small)
    assert {p.dtype for p in load_model(small).parameters()} == {torch.float32}


def test_end_tokens_outlive_training(small):
    """A chat model ends its answers with several tokens, which two files of its folder name."""
    generation = {"temperature": 0.6, "eos_token_id": [9, 10]}
    edit_config(small, bos_token_id=5, eos_token_id=[8, 9], pad_token_id=3)
    (small / "generation_config.json").write_text(json.dumps(generation))
    for _ in range(2):
        trained = load_model(small)
        assert trained.end_tokens == (8, 9, 10) and trained.config.generation == generation
        save_model(trained, small, bos=None, eos=0)  # those of a tokenizer
        config = json.loads((small / "config.json").read_text())
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, [8, 9], 3]


def test_names_of_folders(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small))
    assert hub.local_folder("~/model") == small / "model"
    (small / "run" / "ckpt").mkdir(parents=True)
    for name, words in {
        "https://example.org/model": "hf://owner/name",
        "hf://name": "hf://owner/name",
        "owner/name": "hf://owner/name",
        str(small / "none"): "no checkpoint folder",
        str(small / "run"): "run/ckpt",
        str(small / "run" / "ckpt"): "config.json is missing",
    }.items():
        with pytest.raises(UserError, match=words):
            load_model(name)


def test_the_hub(small, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, "*.safetensors" in allow_patterns))
        if repository == "owner/away":
            raise library.errors.LocalEntryNotFoundError("no network\nlong explanation")
        return str(small)

    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    read_config("hf://owner/name")
    load_model("hf://owner/name@v2")
    assert asked[0] == ("owner/name", None, False) and asked[-1] == ("owner/name", "v2", True)
    with pytest.raises(UserError, match="hf://owner/away cannot be fetched: no network") as error:
        load_model("hf://owner/away")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load_model("hf://owner/name")
