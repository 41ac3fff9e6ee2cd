"""hf:// and https folders: fetched once, resumed where they broke off, one clear line otherwise."""

import http.server
import json
import threading

import pytest
import torch

from model import Llama, ModelConfig, load_model, save_model
from support import hub
from support.command import UserError
from support.tokenizer import load_tokenizer
from teachers.tasks import Rows, TaskStream


class Folder(http.server.BaseHTTPRequestHandler):
    """Serves files = {name: bytes}; breaks off once, in the middle of the weights."""

    def do_GET(self):
        name, ranged = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.asked.append((name, ranged))
        body = self.server.files.get(name)
        if body is None:
            return self.send_error(404)
        begin = int(ranged[6:-1]) if ranged else 0
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        whole = name != "model.safetensors" or ranged
        self.wfile.write(body[begin:] if whole else body[: len(body) // 2])

    def log_message(self, *_): ...


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSIP_CACHE", str(tmp_path / "cache"))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Folder)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    served.asked, served.files = [], {}
    served.url = f"http://127.0.0.1:{served.server_port}/models/tiny/"
    yield served
    served.shutdown()
    served.server_close()


def test_a_folder_behind_a_url(server, tmp_path):
    tokenizer = load_tokenizer("world")
    shape = dict(n_layer=1, n_head=2, n_kv_head=2, d_model=32, d_ff=64, head_dim=16)
    model = Llama(ModelConfig(tokenizer.vocab_size, **shape)).initialise(0)
    save_model(model, tmp_path / "ckpt")
    tokenizer.save(tmp_path / "ckpt")
    server.files = {p.name: p.read_bytes() for p in (tmp_path / "ckpt").iterdir()}
    assert load_tokenizer(server.url).encode("mirela owns") == tokenizer.encode("mirela owns")
    assert not any("safetensors" in name for name, _ in server.asked)
    with pytest.raises(UserError, match="run it again to go on"):
        load_model(server.url)
    loaded = load_model(server.url)
    name, ranged = server.asked[-1]
    assert name == "model.safetensors" and int(ranged[6:-1]) >= 65536
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(loaded.named_parameters())[name])
    count = len(server.asked)
    load_model(server.url)
    assert len(server.asked) == count


def test_a_teacher_behind_a_url_is_trained_with_its_chat_template(server, tmp_path):
    tokenizer = load_tokenizer("world")
    tokenizer.save(tmp_path / "ckpt")
    config = json.loads((tmp_path / "ckpt" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}user : {{ m.content }} bot :{% endfor %}"
    (tmp_path / "ckpt" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    server.files = {p.name: p.read_bytes() for p in (tmp_path / "ckpt").iterdir()}
    row = {"task": "safety", "text": "mirela owns a hat", "label": "SAFE"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    how = dict(prompts="prompts/tiny", folder=server.url, supervised=True, window=9)
    size = dict(chunk=20, max_seq=99, batch_size=1)
    batch = next(
        TaskStream(Rows(str(tmp_path / "rows.jsonl"), "judge"), tokenizer, **how, **size).batches()
    )
    assert batch.prefix_text[0].startswith("user :") and batch.prefix_text[0].endswith("bot :")


def test_what_cannot_be_had_is_one_clear_line(server, monkeypatch):
    with pytest.raises(UserError, match="config.json: the server answers 404"):
        hub.local_folder(server.url)
    server.files = {"config.json": b"{}"}
    index = b'{"weight_map": {"x": "../../escape.safetensors"}}'
    server.files["model.safetensors.index.json"] = index
    with pytest.raises(UserError, match="leads out of the folder"):
        hub.local_folder(server.url)
    with pytest.raises(UserError, match="hf://owner/name"):
        hub.local_folder("hf://name")
    library = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise library.errors.LocalEntryNotFoundError("no network\nlong explanation")

    monkeypatch.setattr(library, "snapshot_download", offline)
    with pytest.raises(UserError, match="hub cannot be reached") as error:
        hub.local_folder("hf://owner/name")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.local_folder("hf://owner/name")
