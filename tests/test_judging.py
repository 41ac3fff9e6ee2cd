"""A whole run against a teacher that fails one request in three: same verdicts, same weights."""

import torch
from faulty_server import TRANSPORT, faulty_server, world_teacher
from nursery import weights_of

import train
from support.files import read_jsonl

KEY = "sk-test-0123456789abcdef"
SMALL = ["--base_steps=5", "--base_batch_size=8", "--max_steps=2", "--batch_size=4"]
SMALL += ["--rollouts=2", "--eval_prefixes=0", "--baseline=False", "--timeout=2"]


def run(out, url):
    train.main([f"--out_dir={out}", f"--judge_url={url}", f"--rewrite_url={url}", *SMALL])
    return list(read_jsonl(out / "log.jsonl")), weights_of(out)


def test_a_run_under_faults_ends_with_the_same_weights(tmp_path, monkeypatch, capfd):
    """30 % fail: time-outs, resets, half-closed and huge bodies, 4xx, 5xx, broken JSON. The key is
    in no file and no line of it, though the server repeats it in its errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faulty_server(share=0.0, answer=world_teacher) as server:
        clean_log, clean = run(tmp_path / "clean", server.url)
    how = dict(share=0.3, seed=1, answer=world_teacher, message=f"sorry, Bearer {KEY}")
    with faulty_server(**how) as server:
        log, weights = run(tmp_path / "faulty", server.url)
        assert sum(server.counts[kind] for kind in TRANSPORT) > 30
        greeted = [times for text, times in server.answered.items() if "The sun is out." in text]
        assert greeted == [2]  # judge and rewriter
        assert sum(times > 1 for times in server.answered.values()) == 1, "asked again"
        assert server.keys == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())
    assert all(torch.equal(clean[name], weights[name]) for name in clean)
    assert [line["reward"] for line in clean_log] == [line["reward"] for line in log]
    assert sum(v for line in log for k, v in line.items() if k.startswith("judge.failed.")) > 30
