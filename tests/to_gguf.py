"""A checkpoint of ours as a float32 GGUF file for llama.cpp, where its own converter cannot be had.

    pip install gguf && python tests/to_gguf.py CKPT OUT.gguf

llama.cpp's `convert_hf_to_gguf.py CKPT` is the published route and does the same for SmolLM2's and
Llama 3's tokenizers; it refuses the pocket world's, which is none of those it knows by fingerprint.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import load_model  # noqa: E402
from tokenizer import (  # noqa: E402
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    WORLD_PATTERN,
    load_tokenizer,
    to_symbols,
)

# llama.cpp's names. It has no rule that cuts at spaces alone. On the pocket world's words and full
# stops Llama 3's cuts at the same places, and like ours takes a whole word unmerged.
PRE_TOKENIZERS = {
    DIGITS_PATTERN: "smollm",
    LLAMA3_PATTERN: "llama-bpe",
    GPT2_PATTERN: "gpt-2",
    WORLD_PATTERN: "llama-bpe",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return NAMES[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_tokenizer(writer, tokenizer, vocab_size: int):
    from gguf import TokenType

    names = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, i in tokenizer.vocabulary.items():
        names[i], types[i] = to_symbols(token), TokenType.NORMAL
    for name, i in tokenizer.specials.items():
        names[i], types[i] = name, TokenType.CONTROL
    if tokenizer.source:
        merges = json.loads(tokenizer.source.read_text(encoding="utf-8"))["model"]["merges"]
    else:
        merges = tokenizer.to_json()["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[tokenizer.pattern])
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_add_bos_token(tokenizer.bos is not None)
    # Named even where nothing puts it before a text: llama.cpp would take token 11.
    writer.add_bos_token_id(tokenizer.eos if tokenizer.bos is None else tokenizer.bos)


def write_shape(writer, c):
    from gguf import LlamaFileType

    writer.add_context_length(c.max_seq)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(LlamaFileType.ALL_F32)


def interleave(weight, heads: int):
    """Rows of Q or K in llama.cpp's order: dimension i of a head beside i + D/2."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(checkpoint: str, out: str):
    from gguf import GGUFWriter

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    config = model.config
    assert config.rope_scaling is None, "llama3 rope scaling needs llama.cpp's own converter"
    writer = GGUFWriter(out, "llama")
    write_shape(writer, config)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, p in model.named_parameters():
        value = p.detach().float()
        if ".q_proj." in name or ".k_proj." in name:
            value = interleave(value, config.n_head if ".q_proj." in name else config.n_kv_head)
        writer.add_tensor(gguf_name(name), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(*sys.argv[1:])
