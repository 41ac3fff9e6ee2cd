"""data.py and support/sources.py: every document once, whatever becomes of shards, connections."""

import contextlib
import gzip
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Stream, digest, in_split, sample_of
from support import command, sources
from support.command import UserError
from support.sources import Files, Skips, list_files, records


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos, start_ids, vocab_size, splits_words = 256, [], 257, True

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")


def stream(source, **options):
    """Chunks of four bytes: with `named` documents, the document's number and a letter."""
    options = dict(chunk=4, max_seq=16, batch_size=4, split="all", epochs=1, window=8) | options
    return Stream(source, Bytes(), **options)


def named(number: int) -> str:
    return "".join(f"{number:03d}{letter}" for letter in "abcdefgh"[: 2 + number % 7])


def suffixes(batches) -> list[str]:
    return [text for batch in batches for text in batch.suffix_text]


def line(record) -> bytes:
    return (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n"


def write(path: Path, rows: list) -> Path:
    """Rows (objects, or bytes as they are) in the format that the path's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(map(line, rows))
    if pack := {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix):
        half = len(body) // 2  # two members, as `cat a.gz b.gz` makes; of gzip some are padded
        zeros = b"\0" * 5000 * (path.suffix == ".gz")
        body = pack(body[:half]) + zeros + pack(body[half:])
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        path.write_bytes(body)
    return path


DAMAGE = [b'{"text": "cut of', b"", b"\r", b"[1, 2]", b'{"text": 7}', b'{"x": "y"}', b"\xff\xfe{}"]
DAMAGE += [b'{"text": "nul \\u0000"}', b'{"text": ""}', b"[" * 100_000, b'{"text": null}', b"\0\0"]
ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet"]


@st.composite
def layouts(draw):
    """Documents dealt to shards of all formats, with damaged lines in between."""
    count, shards = draw(st.integers(1, 60)), draw(st.integers(1, 5))
    deal = draw(st.lists(st.integers(0, shards - 1), min_size=count, max_size=count))
    files = []
    for shard in range(shards):
        rows = [{"text": named(i)} for i in range(count) if deal[i] == shard]
        ending = draw(st.sampled_from(ENDINGS if rows else ENDINGS[:4]))
        for _ in range(draw(st.integers(0, 3)) if ending != ".parquet" else 0):
            rows.insert(draw(st.integers(0, len(rows))), draw(st.sampled_from(DAMAGE)))
        files.append((f"part-{shard}{ending}", rows))
    return count, files


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99), st.data())
def test_every_document_once_an_epoch(tmp_path_factory, layout, window, batch_size, seed, draws):
    """Over three epochs, each cut at a boundary of its own chunks; stopped anywhere and continued
    on another number of ranks."""
    (count, files), folder = layout, tmp_path_factory.mktemp("corpus")
    for name, rows in files:
        write(folder / name, rows)
    options = dict(window=window, batch_size=batch_size, seed=seed, epochs=3)
    whole = list(stream(str(folder), **options).batches())
    seen = suffixes(whole)
    assert len(seen) == 3 * count
    for epoch in range(3):
        assert sorted(int(text[:3]) for text in seen[epoch * count :][:count]) == [*range(count)]
    for batch in whole:
        assert batch.prefix.dtype == batch.suffix.dtype == batch.index.dtype == torch.int64
        assert batch.pad.dtype == torch.int32 and batch.pad.min() == 0
        rows = batch.prefix, batch.pad, batch.prefix_text, batch.suffix_text
        for ids, pad, prefix, suffix in zip(*rows, strict=True):
            text = named(int(suffix[:3]))
            middle = text.index(suffix)
            assert prefix == text[max(0, middle - 12) : middle] != "" and middle % 4 == 0
            assert ids.tolist() == [Bytes.eos] * pad + [*prefix.encode()]
        assert bytes(batch.suffix.flatten().tolist()).decode() == "".join(batch.suffix_text)
    assert torch.cat([batch.index for batch in whole]).tolist() == [*range(3 * count)]

    stop, ranks = draws.draw(st.integers(0, len(whole) - 1)), draws.draw(st.integers(1, 4))
    options |= dict(state=json.loads(json.dumps(whole[stop].state)), world_size=ranks)
    parts = [list(stream(str(folder), rank=r, **options).batches()) for r in range(ranks)]
    rest = whole[stop + 1 :]
    assert [len(part) for part in parts] == [len(rest)] * ranks
    for batch, *slices in zip(rest, *parts, strict=True):
        for rank, part in enumerate(slices):
            assert part.index.tolist() == batch.index[rank::ranks].tolist()
            assert part.prefix_text == batch.prefix_text[rank::ranks]
            assert part.suffix_text == batch.suffix_text[rank::ranks]
            assert part.state == batch.state


@pytest.fixture
def corpus(tmp_path):
    for shard in range(4):
        rows = [{"text": named(i), "meta": {}} for i in range(shard, 200, 4)]
        write(tmp_path / f"chunk{shard % 2}" / f"example_train_{shard}.jsonl.zst", rows)
    return str(tmp_path)


def test_boundaries_are_uniform_and_change_with_the_epoch():
    text = "".join(f"{i:04d}" for i in range(9))  # 36 tokens and an end: 9 chunks, 8 boundaries
    cuts = [sample_of(text, Bytes(), 4, 64, seed, epoch) for seed in range(200) for epoch in (0, 1)]
    counts = Counter(len(prefix) // 4 for prefix, _ in cuts)
    assert set(counts) == set(range(1, 9))
    assert max(counts.values()) < 2 * min(counts.values())


def test_order_is_shuffled_keyed_by_the_seed_and_the_same_with_the_thread(corpus):
    def order(**how):
        return [int(text[:3]) for text in suffixes(stream(corpus, window=64, **how).batches())]

    one, other = order(), order(seed=1)
    assert one == order() != other and sorted(one) == sorted(other) != one
    assert [int(text[:3]) for text in suffixes(stream(corpus, window=64))] == one
    shard = [number for number in one if number % 4 == 0]
    assert shard != sorted(shard)  # also within a shard
    before = {*threading.enumerate()}
    with contextlib.closing(iter(stream(corpus, epochs=None))) as endless:
        for _ in range(300):
            next(endless)
    assert not {*threading.enumerate()} - before


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_error_in_the_thread_reaches_the_loop_as_it_is(corpus, error):
    broken, raised = stream(corpus), error("why")
    broken.tokenizer.encode = lambda text: exec("raise raised", {"raised": raised})
    with pytest.raises(error) as caught:
        list(broken)
    assert caught.value is raised


def test_a_signal_is_heard_while_the_source_hangs():
    class Hanging:
        def documents(self, start):
            yield from ((named(i), {"document": i}) for i in range(8))
            threading.Event().wait()

    with command.listening():
        batches = iter(stream(Hanging()))
        assert len(next(batches).index) == 4
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(command.Interrupted):
            next(batches)


def test_another_set_of_files_is_refused_on_resume(corpus, tmp_path):
    state = next(iter(stream(corpus))).state
    write(tmp_path / "new.jsonl", [{"text": named(1)}])
    with pytest.raises(UserError, match="not those that the run began with"):
        list(stream(corpus, state=state))


def test_splits_share_nothing_and_ignore_the_layout(corpus, tmp_path):
    texts = [f"document number {i}" * 2 for i in range(3000)]
    one = write(tmp_path / "one" / "a.jsonl", [{"text": t} for t in texts])
    two = write(tmp_path / "two" / "b.json.gz", [{"raw_content": t} for t in reversed(texts)])
    parts = {}
    for split in ("train", "teacher", "validation", "test"):
        streams = (stream(str(p), split=split, max_seq=200, window=1) for p in (one, two))
        found = [{t for batch in s.batches() for t in batch.prefix_text} for s in streams]
        assert found[0] == found[1]  # the same documents, cut at the same places
        parts[split] = {t for t in texts if in_split(digest(t), split)}
        assert len(found[0]) <= len(parts[split])
    assert sum(map(len, parts.values())) == len(texts) == len(set().union(*parts.values()))
    assert 0.87 < len(parts["train"]) / 3000 < 0.93 and len(parts["test"]) > 10


# ---- What can't be read --------------------------------------------------------------------------


def read(path, **options) -> tuple[list[str], Skips]:
    skips = Skips()
    files = Files(str(path), skips, **options)
    return [text for text, _ in files.documents(files.beginning(0))], skips


LONG = [f"{i} " + random.Random(i).randbytes(2000).hex() for i in range(200)]
BODY = b"".join(line({"text": text}) for text in LONG)
BOOKS = [".\nA book that begins with a dot.", "corpus\nof many books\nand one", "# Title\n\nText"]
BOOKS += ["a.jsonl\n\nis a file that this book is about.\nIt has no other lines."]
FAR = b'{"text": "from afar"}\n'  # as `zstd --ultra --long=31` writes: a window of 2**31 bytes
FAR = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + (1 | len(FAR) << 3).to_bytes(3, "little") + FAR
SKIPPED = {"damaged line": 3, "text is not a string": 2, "not a JSON object": 1, "missing field": 1}
SKIPPED |= {"invalid UTF-8": 1, "NUL in text": 1, "empty text": 1}
FIELDS = [{"meta": {}, "text": "SlimPajama"}, {"raw_content": "RedPajama-V2"}, {"content": "code"}]
PAIR, BOM = b'{"text": "\\ud83d \\ud83d\\ude00"}', b'\xef\xbb\xbf{"text": "bom"}'
FILES = {  # name, rows (or the bytes of the file), texts, what is skipped
    "damage": ("a.jsonl.zst", [{"text": "one"}, *DAMAGE, {"text": "x"}], ["one", "x"], SKIPPED),
    "fields": ("a.json.gz", FIELDS, ["SlimPajama", "RedPajama-V2", "code"], {}),
    "half a pair": ("a.jsonl", [PAIR], ["\ufffd \U0001f600"], {}),
    "byte order mark": ("a.jsonl", [BOM, {"text": "none"}], ["bom", "none"], {}),
    "name in latin-1": (os.fsdecode(b"caf\xe9.jsonl"), [{"text": "name"}], ["name"], {}),
    "far window": ("a.jsonl.zst", FAR, ["from afar"], {}),
    "empty": ("a.jsonl", b"", [], {}),
    "line ends": ("a.jsonl", b"\n\n\n", [], {}),
}
FILES |= {text[:8]: ("book.txt", text.encode(), [text], {}) for text in BOOKS}


@pytest.mark.parametrize("kind", FILES)
def test_a_file(tmp_path, monkeypatch, caplog, kind):
    """Its texts, and what is skipped by reason. A book is no list, whatever lies beside it."""
    name, rows, texts, skipped = FILES[kind]
    monkeypatch.chdir(tmp_path)
    for other in ("corpus/a.jsonl", "a.jsonl"):
        write(tmp_path / other, [{"text": "not this"}])
    if isinstance(rows, bytes):
        Path(name).write_bytes(rows)
    else:
        write(Path(name), rows)
    assert read(name) == (texts, skipped)
    Path("list.txt").write_bytes(os.fsencode(tmp_path / name))
    assert read("list.txt")[0] == texts if "book" not in name else list_files(name) == [name]
    if kind == "damage":
        assert f"{name}:2: damaged line" in caplog.text and "only counted" in caplog.messages[4]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_compression_keeps_what_came_before(tmp_path, ending, caplog):
    path = write(tmp_path / f"a{ending}", [{"text": text} for text in LONG])
    path.write_bytes(path.read_bytes()[:-1000])
    write(tmp_path / "b.jsonl", [{"text": "next shard"}])
    found, skips = read(tmp_path)
    found.remove("next shard")
    assert 100 < len(found) < 200 and found == LONG[: len(found)]
    assert skips.pop("truncated compression") == 1 and "after line" in caplog.text
    assert skips in ({}, {"damaged line": 1})


BROKEN = [b"\x28\xb5\x2f\xfdgarbage", b"\x1f\x8bgarbage", b"PAR1 no parquet", None]  # None: gone
LOSSES = [(198, 2, False), (197, 3, True), (9, 1, False), (8, 2, True), (8, 1, True), (0, 1, True)]


@pytest.mark.parametrize("body", BROKEN)
@pytest.mark.parametrize("whole, broken, stops", LOSSES)
def test_few_lost_shards_are_noted_and_more_stop_the_run(tmp_path, body, whole, broken, stops):
    for i in range(whole):
        write(tmp_path / f"{i:03d}.jsonl", [{"text": f"document {i}"}])
    ending = "parquet" if body == BROKEN[2] else "jsonl"
    for path in (lost := [tmp_path / f"broken{i}.{ending}" for i in range(broken)]):
        path.write_bytes(body or b"")
    files = Files(str(tmp_path), Skips())
    for path in lost if body is None else []:
        path.unlink()
    if stops:
        with pytest.raises(UserError, match=rf"broken\d.*of {whole + broken} shards can't be read"):
            list(files.documents(files.beginning(0)))
        return
    for epoch in (0, 1):  # the same ones are lost again
        assert len(list(files.documents(files.beginning(epoch)))) == whole
    assert len(files.skips.lost) == broken


def test_one_clear_error_when_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PATIENCE", 3)  # doesn't read terabytes to find that out
    write(tmp_path / "a.jsonl", [{"text": "short"}, b"{", b"{"])
    write(tmp_path / "many.jsonl", [{"body": "a text", "id": 1}] * 3 + [{"text": "late"}])
    (tmp_path / "empty").mkdir()
    cases = [
        ("nothing.jsonl", {}, "no such file"),
        ("empty", {}, "no shard"),
        ("a.jsonl", {"epochs": None}, r"damaged line: 2.*shorter than two chunks: 1"),
        ("a.jsonl", {"text_field": "body"}, "missing field: 1"),
        ("many.jsonl", {}, "missing field.*its fields: body, id"),
        ("a.jsonl", {"max_seq": 7}, "two chunks"),
        ("a.jsonl", {"split": "trian"}, "no split"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            list(stream(str(tmp_path / name), **options))
    seven = write(tmp_path / "b.jsonl", [{"text": "abcdefg"}, {"text": "abcdef"}])
    assert suffixes(stream(str(seven)).batches()) == ["efg"]  # and an end of text: two chunks


def test_memory_stays_bounded(tmp_path):
    """A 1 GB line packed to kilobytes, nothing but line ends likewise, and a plain 300 MB line."""
    squeeze = zstandard.ZstdCompressor(level=1).compressobj()
    megabyte = b"a" * (1 << 20)
    packed = [squeeze.compress(b'{"text": "'), *(squeeze.compress(megabyte) for _ in range(1024))]
    (tmp_path / "1.jsonl.zst").write_bytes(b"".join([*packed, squeeze.flush()]))
    (tmp_path / "2.jsonl.zst").write_bytes(zstandard.compress(b"\n" * (16 << 20)))
    with open(tmp_path / "3.jsonl", "wb") as file:
        file.writelines([b'{"text": "'] + [megabyte] * 300 + [b'"}\n{"text": "after"}\n'])
    code = """
import resource, sys
from support import sources
sources.BOMB = (4 << 20, 200)
skips, base = sources.Skips(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = sources.Files(sys.argv[1], skips)
skips.shards = 1000  # so that two may be lost
print([text for text, _ in files.documents(files.beginning(0))], sorted(skips.items()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""
    how = dict(cwd=Path(data.__file__).parent, capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], **how)
    found, grown = done.stdout.splitlines()
    assert found == "['after'] [('decompression bomb', 2), ('line too long', 1)]"
    assert int(grown) < 120  # MiB


def test_a_parquet_bomb_and_a_list_of_itself_are_refused(tmp_path):
    text = pyarrow.array(["a" * (1 << 20)] * 40)
    how = dict(compression="zstd", use_dictionary=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet", **how)
    with pytest.raises(UserError, match="decompression bomb"):
        list(records(str(tmp_path / "a.parquet"), Skips()))
    (tmp_path / "list.txt").write_text(f"{tmp_path}/list.txt\n")
    with pytest.raises(UserError, match="lists within lists"):
        list_files(str(tmp_path / "list.txt"))


# ---- Formats and places --------------------------------------------------------------------------


def test_plain_text_becomes_passages(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 100 for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    texts, _ = read(tmp_path / "book.txt")
    assert len(texts) > 5 and all(8000 < len(t) < 9500 for t in texts[:-1])
    assert "\n\n".join(t.rstrip("\n") for t in texts) == "\n\n".join(paragraphs)
    files = Files(str(tmp_path / "book.txt"), Skips())
    walk = list(files.documents(files.beginning(0)))
    assert [t for t, _ in files.documents(walk[2][1])] == texts[3:]


TEXTS = [f"document {i}" for i in range(40)]
IN_BYTES = [text.encode() for text in TEXTS]
COLUMNS = {  # (the text, another column)
    "large": (pyarrow.array(TEXTS, pyarrow.large_string()), TEXTS),
    "dictionary": (pyarrow.array(TEXTS).dictionary_encode(), TEXTS),
    "view": (pyarrow.array(TEXTS, pyarrow.string_view()), TEXTS),
    "bytes": (pyarrow.array(IN_BYTES), TEXTS),
    "damaged": (pyarrow.array([b"caf\xe9", *IN_BYTES[1:]]).view(pyarrow.string()), TEXTS),
    "year 10,000": (TEXTS, pyarrow.array([3_000_000] * 40, pyarrow.date32())),
    "nanoseconds": (TEXTS, pyarrow.array([1] * 40, pyarrow.timestamp("ns"))),
    "nested": (TEXTS, pyarrow.array([{"a": [{"b": 2}]}] * 40)),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_parquet(tmp_path, kind, monkeypatch):
    """Text of all types; only its column is read where no other is used."""
    path = str(tmp_path / "a.parquet")
    table = pyarrow.table(dict(zip(("text", "other"), COLUMNS[kind], strict=True)))
    pyarrow.parquet.write_table(table, path)
    spoilt = kind == "damaged"
    assert read(path) == (TEXTS[spoilt:], {"invalid UTF-8": 1} if spoilt else {})
    found = list(records(path, Skips(), start=20))
    assert [number for number, _ in found] == list(range(21, 41))
    assert kind != "nested" or found[0][1]["other"] == {"a": [{"b": 2}]}
    monkeypatch.setattr(sources, "values", lambda column: TEXTS[:16][: len(column)])
    assert {record["other"] for _, record in records(path, Skips(), fields=["text"])} == {None}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(path)


def test_places(tmp_path):
    beside = ["x/d.md", *(f"x/y/c.{kind}.json.gz" for kind in ("signals", "minhash", "duplicates"))]
    inside = ["x/a, too.jsonl", "x/b.json.gz", "x/y/C.JSONL", "x/y/c.Json.GZ", "x/y/c.jsonl.zst"]
    for name in (*beside, *inside):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    where = {
        f"{tmp_path}": inside,
        f"{tmp_path}/x/*.jsonl, {tmp_path}/x/y": [inside[0], *inside[2:]],
        f"{tmp_path}/**/*.zst": [inside[4]],
        f"{tmp_path}/x/a, too.jsonl": [inside[0]],
    }
    for source, names in where.items():
        assert list_files(source) == [str(tmp_path / name) for name in names]
    assert list_files("http://h/a.jsonl.zst?b=1, https://h/c.gz")[0] == "http://h/a.jsonl.zst?b=1"


LISTS = {  # what stands before the lines, before the names in them, and where they are read from
    "absolute": (b"", "{}/", "."),
    "byte order mark, of the home": (b"\xef\xbb\xbf", "~/", "."),
    "blank lines, of the list": (b"\n  \r\n", "../", "."),
    "comments and a mark, of the caller": (b"\xef\xbb\xbf# one\n# two\n\n", "", ".."),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_shards(tmp_path, monkeypatch, kind):
    before, prefix, here = LISTS[kind]
    (tmp_path / "lists" / "deeper").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "lists/deeper" / here / here)
    for i in range(3):
        write(tmp_path / "corpus" / f"{i}.jsonl", [{"text": str(i)}])
    rows = "{0}corpus/0.jsonl\r\n{0}corpus/[12].jsonl".format(prefix.format(tmp_path))
    path = tmp_path / "lists" / "LIST.TXT"
    path.write_bytes(before + rows.encode())
    assert [Path(shard).name for shard in list_files(str(path))] == [f"{i}.jsonl" for i in range(3)]
    assert sorted(read("~/lists/LIST.TXT")[0]) == ["0", "1", "2"]
    write(tmp_path / "lists" / "3.jsonl", [])
    assert len(list_files(str(path.parent))) == 1  # the folder of a corpus may hold a list of it


@pytest.mark.parametrize("rows", ["a.jsonl\ngone.jsonl", "gone.jsonl\nof/another/folder.parquet"])
def test_what_a_list_lacks_is_named(tmp_path, rows):
    write(tmp_path / "a.jsonl", [{"text": "here"}])
    (tmp_path / "list.txt").write_text(rows)
    with pytest.raises(UserError, match=r"no such file.*gone\.jsonl \(a line of .*list\.txt\)"):
        list_files(str(tmp_path / "list.txt"))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; breaks connections, lacks Range or fails as it is told."""

    protocol_version, kind = "HTTP/1.1", "application/octet-stream"
    trouble, ranges, step = [], True, None  # statuses to come; bytes a connection

    def do_GET(self):
        path, asked = self.path.split("?")[0], self.headers.get("Range")
        self.log.append((path, asked))
        body, start = self.files.get(path, b""), 0
        status = (self.trouble.pop(0) if self.trouble else None) or (200 if body else 404)
        if status == 200 and asked and self.ranges:
            status, start = 206, int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        body = body[start:] if status < 300 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body if status == 200 and asked else body[: self.step])
        self.close_connection = bool(self.step)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    handler = type("Handler", (Server,), {"files": {}, "log": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.handle_error = lambda *_: None  # who asked may hang up
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}"
    yield handler
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("behaviour", ["whole", "breaks", "breaks, has no ranges"])
def test_reading_from_the_web(server, tmp_path, ending, behaviour):
    """A broken connection is resumed where it broke, or else the file read again."""
    body = write(tmp_path / f"a{ending}", [{"text": text} for text in LONG]).read_bytes()
    server.files["/a" + ending], server.ranges = body, "no ranges" not in behaviour
    step = len(body) // 5
    server.step = step if behaviour != "whole" else None
    assert read(f"{server.url}/a{ending}?download=true") == (LONG, {})
    asked = [None] if behaviour == "whole" else [None, f"bytes={step}-", f"bytes={2 * step}-"]
    asked = asked if server.ranges else asked[:2]
    assert [asked for _, asked in server.log][: len(asked)] == asked


def test_failing_servers_and_missing_shards(server):
    server.files |= {f"/{i}.jsonl": BODY for i in range(1, 20)}
    names = [f"{server.url}/{i}.jsonl" for i in range(20)]
    server.trouble = [503, 429, 500]
    assert read(",".join(names)) == (LONG * 19, {"unreadable file": 1})
    del server.files["/7.jsonl"]
    with pytest.raises(UserError, match="2 of 20 shards"):
        read(",".join(names))
    server.trouble = [503] * 99
    for dead in (names[1], "http://127.0.0.1:9/a.jsonl"):
        with pytest.raises(UserError, match="can't be read"):
            read(dead)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 407, 410, 451, None])
def test_a_server_that_refuses_stops_the_run(server, status):
    """Even one of many shards: the others will be refused too."""
    server.files |= {f"/{i}.jsonl": BODY for i in range(200)}
    server.trouble, told = [None, status], f"HTTP {status}"
    if status is None:  # "please log in"
        server.kind, told = "text/html; charset=utf-8", "with a web page"
    with pytest.raises(UserError, match=rf"{server.url}/\d+.jsonl answers {told}: renew"):
        read(",".join(f"{server.url}/{i}.jsonl" for i in range(200)))
    assert len(server.log) == (2 if status else 1)


def test_a_signed_address_may_be_renewed(server):
    server.files["/a.jsonl"] = BODY
    old, new = (Files(f"{server.url}/a.jsonl?sig={i}", Skips()) for i in (1, 2))
    texts = list(old.documents(old.beginning(0)))
    assert list(new.documents(texts[9][1])) == texts[10:]


def test_memory_of_a_large_window_is_bounded(tmp_path, monkeypatch):
    """Long documents end a window early, so that it never holds more than WINDOW_BYTES."""
    monkeypatch.setattr(data, "WINDOW_BYTES", 5000)
    path = write(tmp_path / "a.jsonl", [{"text": named(i) * 100} for i in range(60)])
    windows = list(stream(str(path), window=1000).windows(Files(str(path), Skips()).beginning(0)))
    assert len(windows) > 10 and sum(len(texts) for texts, _ in windows) == 60
