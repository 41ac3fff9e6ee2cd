"""What llama.cpp gets from us is what the converter in the other direction reads back."""

import pytest
import torch
from convert_smollm2 import write_weights
from to_gguf import write_gguf

from model import Llama, ModelConfig, load_model, save_model
from tokenizer import load_tokenizer


def test_there_and_back(tmp_path):
    gguf = pytest.importorskip("gguf")
    tokenizer = load_tokenizer("world")
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, head_dim=16, max_seq=128)
    model = Llama(ModelConfig(tokenizer.vocab_size, tie_embeddings=True, **shape)).initialise(0)
    save_model(model, tmp_path / "ckpt", eos=tokenizer.eos)
    tokenizer.save(tmp_path / "ckpt")
    write_gguf(tmp_path / "ckpt", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == tokenizer.vocab_size
    assert not any("[PAD" in t for t in reader.fields["tokenizer.ggml.tokens"].contents())
    write_weights(reader, tmp_path / "back")
    back = load_model(tmp_path / "back")
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
