"""The two-stage unsafe filter and the inspection of a corpus, on RedPajama-V2's files."""

import gzip
import json
import re
import subprocess
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard
from faulty_server import faulty_server, world_teacher
from test_data import write
from test_synthetic import wait_for_answers

import data
from support.command import UserError, python, running
from support.sources import Skips
from tools import filter as filters
from tools import inspect
from world import corpus, truth

GOOD = {
    "rps_doc_word_count": [[0, 90, 120]],
    "rps_doc_mean_word_length": [[0, 90, 4.5]],
    "rps_doc_symbol_to_word_ratio": [[0, 90, 0.01]],
    "ccnet_nlines": [[0, 90, 4]],
    "rps_lines_start_with_bulletpoint": [[0, 20, 0.0], [20, 40, 1.0], [40, 60, 0.0], [60, 90, 0.0]],
    "rps_doc_frac_chars_top_2gram": [[0, 90, 0.05]],
    "rps_doc_ldnoobw_words": [[0, 90, 6.0]],
    "rps_doc_ut1_blacklist": [[0, 90, 3]],
}
WORDS, MEAN, SYMBOLS, BULLETS, BIGRAM = filters.RULES
BOTH = "curse words, blocklist (both)"
CASES = {  # signal -> values, and what removes the document when *both* reasons are needed
    "rps_doc_word_count": {50: None, 49: WORDS, 100_000: None, 100_001: WORDS, None: WORDS},
    "rps_doc_mean_word_length": {3.0: None, 2.99: MEAN, 10.01: MEAN, None: MEAN},
    "rps_doc_symbol_to_word_ratio": {0.1: None, 0.11: SYMBOLS, None: None},
    "rps_doc_frac_chars_top_2gram": {0.2: None, 0.21: BIGRAM},
    "rps_doc_ldnoobw_words": {5.0: None, 4.0: BOTH},
    "rps_doc_ut1_blacklist": {0: None, None: BOTH},  # 0 is a category like any other
}
VARIANTS = [(name, v, rule) for name, cases in CASES.items() for v, rule in cases.items()]
LINES = 20 * len(VARIANTS)  # of each shard below


def signals(**changes) -> dict:
    return GOOD | {name: [[0, 90, value]] for name, value in changes.items()}


def removed_by(quality: dict, unsafe: str = "both") -> str | None:
    return filters.first_failure(filters.published_signals({"quality_signals": quality}), unsafe)


def test_thresholds():
    for name, value, rule in VARIANTS:
        assert removed_by(signals(**{name: value})) == rule, (name, value)
    bullets = [[i, i + 1, 1.0] for i in range(9)] + [[9, 10, 0.0]]
    lines = GOOD | {"rps_lines_start_with_bulletpoint": bullets}
    assert removed_by(lines | {"ccnet_nlines": [[0, 90, 10]]}) is None
    assert removed_by(lines | {"ccnet_nlines": [[0, 90, 9]]}) == BULLETS
    for curses, listed, readings in ((6, None, ["either"]), (0, 3, ["either"]), (0, None, [])):
        found = signals(rps_doc_ldnoobw_words=curses, rps_doc_ut1_blacklist=listed)
        assert [name for name in filters.UNSAFE if removed_by(found, name) is None] == readings


@pytest.fixture
def redpajama(tmp_path):
    """Two shards of documents/ with quality_signals/ beside them; one line of each is damaged."""
    for shard in ("0000", "0001"):
        rows, quality = [], []
        for i, (name, value, _) in enumerate(VARIANTS * 20):
            url = f"http://site.example/{shard}/{i}"
            rows.append({"url": url, "raw_content": f"{url} {'some text ' * 40}", "nlines": 4})
            entry = {"id": f"2023-14/{shard}/en_head.json.gz/{i}", "metadata": {"url": url}}
            quality.append(entry | {"quality_signals": signals(**{name: value})})
        rows[3] = b'{"raw_content": "damaged'
        quality[5] = b"{"
        write(tmp_path / f"rp/documents/2023-14/{shard}/en_head.json.gz", rows)
        write(tmp_path / f"rp/quality_signals/2023-14/{shard}/en_head.signals.json.gz", quality)
    return tmp_path / "rp"


def kept(folder: Path) -> dict[str, list[dict]]:
    found = {}
    for file in sorted(folder.glob("*/*.jsonl.zst")):
        lines = zstandard.open(file, "rt", encoding="utf-8").read().splitlines()
        found.setdefault(file.parent.name, []).extend(map(json.loads, lines))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*.zst")}


def run(source, out, *flags) -> Counter:
    return filters.main([str(source), f"--out={out}", "--chunk=16", "--max_seq=64", *flags])


def test_what_is_kept_and_counted(redpajama, tmp_path, capsys):
    run(redpajama, tmp_path / "out")
    said = capsys.readouterr().out
    good = [i for i, (*_, rule) in enumerate(VARIANTS * 20) if rule is None and i not in (3, 5)]
    found, urls = kept(tmp_path / "out"), []
    for split, rows in found.items():
        assert all(data.in_split(data.digest(row["text"]), split) for row in rows)
        urls += [row["meta"]["url"] for row in rows]
    shards = [f"http://site.example/{shard}" for shard in ("0000", "0001")]
    assert sorted(urls) == sorted(f"{shard}/{i}" for shard in shards for i in good)
    meta, table = rows[0]["meta"], said.splitlines()
    assert meta["signals"]["top_2gram"] <= 0.2 and meta["reasons"][1].startswith("blocklist")
    assert meta["source"].endswith(tuple(f"en_head.json.gz:{i + 1}" for i in good))
    assert table[0].split()[:2] == ["documents", str(2 * (LINES - 2))]
    removed = {row[2:40].strip(): int(row.split()[-2]) for row in table if row.startswith("- ")}
    expected = Counter(rule for i, (*_, rule) in enumerate(VARIANTS * 20) if i not in (3, 5))
    assert removed == {rule: 2 * expected[rule] for rule in expected if rule} | {BULLETS: 0}
    assert sum(int(row.split()[-2]) for row in table if "kept for" in row) == 2 * len(good)
    assert "damaged line" in said and "no quality signals" in said
    with pytest.raises(UserError, match="is not empty"):
        run(redpajama, tmp_path / "out")


def test_it_goes_on_with_the_shard_it_was_stopped_in(redpajama, tmp_path, monkeypatch, capsys):
    """Stopped anywhere, by anything: the same bytes, the same table, no finished shard read."""
    whole, stopped, read, kept_of = tmp_path / "whole", tmp_path / "stopped", [], filters.kept_of
    run(redpajama, whole)
    table = capsys.readouterr().out

    def stops(name, *rest):
        read.append(name)
        for number, row in enumerate(kept_of(name, *rest)):
            if len(read) == 2 and number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(filters, "kept_of", stops)
    with pytest.raises(KeyboardInterrupt):
        run(redpajama, stopped)
    assert not files(stopped)
    run(redpajama, stopped)
    assert read == [read[0], read[1], read[1]] and files(stopped) == files(whole)
    assert sorted(f.name for f in stopped.iterdir()) == sorted(filters.OUTPUTS)
    assert capsys.readouterr().out == table
    read.clear()
    with pytest.raises(KeyboardInterrupt):
        run(redpajama, tmp_path / "other")
    run(redpajama, tmp_path / "other", "--unsafe=either")  # other rules: another run
    assert read == [read[0], read[1], *read[:2]]


def test_signals_of_another_document_are_not_used(redpajama):
    partner = redpajama / "quality_signals/2023-14/0000/en_head.signals.json.gz"
    lines = gzip.decompress(partner.read_bytes()).splitlines()
    partner.write_bytes(gzip.compress(b"\n".join([lines[1], lines[0], *lines[2:]])))
    skips = Skips()
    shard = str(redpajama / "documents/2023-14/0000/en_head.json.gz")
    found = [number for number, _ in filters.records_with_signals(shard, skips)]
    assert found == [3, 5, *range(7, LINES + 1)]  # 4 and 6 are damaged, 1 and 2 exchanged
    assert skips["quality signals of another document"] == 2


def test_an_export_in_parquet(tmp_path, capsys):
    """Signals as JSON strings, two of them damaged. Of the columns only what is used is read, not
    dates that Python cannot hold; what JSON has no form for is kept as text."""
    found = [json.dumps(signals(**{name: value})) for name, value, _ in VARIANTS]
    found += [json.dumps(signals(rps_doc_word_count="many")), "{"]
    columns = {"quality_signals": found, "raw_content": [f"text {i}" for i in range(len(found))]}
    for name, day in {"doc_id": 10**6, "seen": 2**31 - 1}.items():
        columns[name] = pyarrow.array([day] * len(found), pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("unreadable: ") == 2
    assert "unreadable: no quality" in said and "unreadable: damaged quality" in said
    assert re.search(rf"- {WORDS} +3 ", said) and re.search(rf"- {MEAN} +3 ", said)
    rows = [row for split in kept(tmp_path / "out").values() for row in split]
    assert len(rows) == 8 and rows[0]["meta"]["doc_id"] == "4707-11-29"


@pytest.fixture
def threats(tmp_path):
    """A shard of the pocket world, half of it unsafe, and its texts."""
    source = corpus.WorldSource(dials=corpus.Dials(share_unsafe=0.5)).documents()
    texts = [text for text, _ in islice(source, 1500)]
    write(tmp_path / "a.jsonl", [{"text": t, "quality_signals": GOOD} for t in texts])
    return tmp_path / "a.jsonl", texts


def test_stage_two_asks_about_the_prefix(threats, tmp_path, capsys):
    """A teacher that knows: kept are those validation and test samples whose prefix is unsafe."""
    source, texts = threats
    with running(python("world.teacher", "serve")) as url:
        run(source, tmp_path / "out", f"--judge_url={url}")
    tokenizer, expected = filters.load_tokenizer("world"), {}
    for text in texts:
        for split in ("validation", "test"):
            sample = data.sample_of(text, tokenizer, 16, 64)
            inside = sample and data.in_split(data.digest(text), split)
            if inside and not truth.safe(tokenizer.decode(sample[0])):
                expected.setdefault(split, []).append(text)
    found = kept(tmp_path / "out")
    assert expected and sum(map(len, expected.values())) > 4
    for split in ("validation", "test"):
        assert [row["text"] for row in found[split]] == expected[split]
        assert all(row["meta"]["unsafe_judgments"] == 8 for row in found[split])
        # The whole folder is a corpus: training and evaluation each find their split in it.
        size = dict(chunk=16, max_seq=64, batch_size=1, seed=0, split=split, epochs=1)
        stream = data.Stream(str(tmp_path / "out"), tokenizer, **size)
        assert len(list(stream.samples())) == len(found[split])
    assert re.search(r"- prefix not unsafe in all judgments +[1-9]", capsys.readouterr().out)
    assert len(found["train"]) + len(found["teacher"]) > 1400


def test_a_kill_costs_no_verdict_and_no_byte(threats, tmp_path):
    with faulty_server(answer=world_teacher, latency=0.02) as server:
        command = python("tools.filter", threats[0], "--chunk=16", "--max_seq=64")
        command += ["--judge_url", server.url, "--judge_extra=effort=low", "--out"]
        subprocess.run([*command, tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
        questions = server.counts.total()
        server.latency, server.counts = 0.3, Counter()
        process = subprocess.Popen([*command, tmp_path / "killed"])
        known = wait_for_answers(tmp_path / "killed" / "judgments.sqlite", 20)
        process.kill()
        process.wait()
        assert not files(tmp_path / "killed")
        server.latency, server.counts = 0.0, Counter()
        subprocess.run([*command, tmp_path / "killed"], check=True, stdout=subprocess.DEVNULL)
        assert server.counts.total() == questions - known > 0
        assert {request["effort"] for request in server.requests} == {"low"}
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


def test_inspect_shows_what_is_there(redpajama, tmp_path, capsys):
    inspect.main([str(redpajama), "--chunk", "16", "--max_seq", "64"])
    shown = capsys.readouterr().out
    assert "2 .json" in shown and f"documents  {2 * (LINES - 1)}" in shown
    assert "raw_content: str" in shown and "duplicates 0" in shown
    assert shown.count("sample ") == 5 and "skipped, damaged line: 2" in shown


@pytest.mark.parametrize(
    "flags, said",
    [
        (["nowhere.jsonl"], "no such file, folder or pattern: nowhere.jsonl"),
        (["a.jsonl", "--chunk=0"], "--chunk must be above 0"),
        (["a.jsonl", "--max_seq=100"], "--max_seq must be at least twice --chunk"),
        (["a.jsonl", "--votes=0"], "--votes must be above 0"),
        (["a.jsonl", "--out=a.jsonl/x"], "a.jsonl/x"),  # in no folder
        (["a.jsonl"], "a.jsonl:1 has no quality signals: download"),
        (["b.jsonl"], "b.jsonl: no document can be read ({'damaged line': 1})"),
    ],
)
def test_bad_input_is_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), [{"text": "word " * 100}])
    write(Path("b.jsonl"), [b"{"])
    with pytest.raises((UserError, OSError)) as error:
        filters.main(["--out=x", *flags])
    assert not files(Path("x"))
    assert said in str(error.value) and "\n" not in str(error.value)
