"""llama.cpp as tools.bench's peer: its batch API, one prefix whose cache K sequences share.

In: a model.Llama and a prefix. Out: a function that samples. pip install llama-cpp-python gguf
"""

import logging
import tempfile

import numpy as np
import torch

from model import Llama
from rollout import sample


def write_gguf(ours: Llama, path: str, dtype: torch.dtype):
    """The same weights for llama.cpp, its matrices in a type; without a tokenizer."""
    import gguf

    c, file = ours.config, gguf.GGUFWriter(path, "llama")
    numbers = dict(block_count=c.n_layer, context_length=c.max_seq, vocab_size=c.vocab_size)
    numbers |= dict(embedding_length=c.d_model, feed_forward_length=c.d_ff, head_count=c.n_head)
    numbers |= dict(head_count_kv=c.n_kv_head, rope_dimension_count=c.head_dim)
    numbers |= dict(layer_norm_rms_eps=c.norm_eps, rope_freq_base=c.rope_theta)
    for name, number in numbers.items():
        getattr(file, f"add_{name}")(number)
    file.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.n_layer)
    for name, p in ours.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # its rope turns neighbours
            p = p.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        p = p.to(dtype) if p.dim() > 1 else p
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), p.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_cpp_sampler(ours: Llama, kind: str, prefix, u):
    """A function of nothing: K rollouts of N tokens of a prefix [P], keyed by u [K, N]; `kind` is
    the weights' type, the cache is float32. Tokens are drawn by our own `sample`."""
    import llama_cpp as cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    (P,), (K, N) = prefix.shape, u.shape
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(ours, path := f"{folder}/{kind}.gguf", getattr(torch, kind))
        model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    how = cpp.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_seq_max, how.kv_unified = P + K * N, P, K, True
    how.n_threads = how.n_threads_batch = torch.get_num_threads()
    how.type_k = how.type_v = cpp.GGML_TYPE_F32
    how.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds, and is no faster here
    context = cpp.llama_init_from_model(model, how)
    memory = cpp.llama_get_memory(context)

    def logits(tokens, at, sequences, wanted: int):  # of the last; valid until the next call
        batch = cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, t, k) in enumerate(zip(tokens, at, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, t, k
            batch.n_seq_id[i], batch.logits[i] = 1, i >= len(tokens) - wanted
        assert cpp.llama_decode(context, batch) == 0
        cpp.llama_batch_free(batch)
        shape = wanted, ours.config.vocab_size
        return torch.from_numpy(np.ctypeslib.as_array(cpp.llama_get_logits(context), shape))

    def run():
        cpp.llama_memory_clear(memory, False)
        found = logits(prefix.tolist(), range(P), [0] * P, 1).expand(K, -1)
        for k in range(1, K):
            cpp.llama_memory_seq_cp(memory, 0, k, -1, -1)
        for t in range(N):
            token, _ = sample(found, u[:, t], 1.0, 1.0)
            found = logits(token.tolist(), [P + t] * K, range(K), K) if t < N - 1 else found

    return run
