"""Documents out of files and URLs, one after the other, in constant memory.

In:  a path, glob, folder, URL, a .txt list of those, or several separated by commas
Out: `records` yields (line number, JSON object) of one shard; `Files` yields the texts of a corpus

Whatever can't be read is noted in `Skips` with file and line, and reading goes on after it, until
too many shards are lost. What refuses us (HTTP 401, 403, 410 ...) ends the reading at once.
"""

import collections
import contextlib
import errno
import functools
import glob
import json
import logging
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3
import zstandard

from support.command import UserError

log = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "raw_content", "content")  # SlimPajama, FineWeb, DCLM; RedPajama-V2; code
ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet", ".txt")
PACKED = (".gz", ".zst", ".zstd")
MAX_LINE = 16 << 20  # bytes; a longer line is skipped without being held
PASSAGE = 8192  # bytes of plain text that make a document, up to the next blank line
SIP = 2048  # compressed bytes unpacked at once, which bounds what a bomb can make of them
PIECE = 1 << 18  # bytes of content handed on at once
BOMB = (64 << 20, 200)  # a file is refused when this many bytes were that many times smaller
ROW_GROUP = 16 << 20  # bytes: a smaller row group of a parquet file is never called a bomb
PATIENCE = 10_000  # records in a row without a text before a corpus is refused
LOSS, FEW = 0.01, 10  # share of the shards that may break off; one always may, if it gave something
RETRIES = 6  # of a download that makes no progress
TIMEOUT = (10, 60)  # seconds to connect, to wait for bytes
TRY_AGAIN = (408, 425, 429, *range(500, 600))  # HTTP statuses


class Damage(OSError):
    """The rest of a file can't be used; the message is the reason."""


class Skips(collections.Counter):
    """What was left out, by reason; the first few are shown with file and line."""

    def __init__(self):
        super().__init__()
        self.shown, self.shards, self.lost = 5, 1, set()  # of how many shards which are lost

    def note(self, reason: str, where: str) -> None:
        self[reason] += 1
        if self.shown:
            self.shown -= 1
            more = "" if self.shown else " (further ones are only counted)"
            log.warning("skipped %s: %s%s", where, reason, more)

    def lose(self, name: str, line: int, error: Exception) -> None:
        """The rest of a shard can't be read. UserError where that is too much of the corpus."""
        damage = isinstance(error, Damage)
        reason, why = (str(error), "") if damage else ("unreadable file", f" ({error})")
        self.note(reason, f"the rest of {name} after line {line}{why}")
        self.lost.add(name)
        nothing = line == 0 and self.shards < FEW
        if nothing or len(self.lost) > max(1, LOSS * self.shards):
            raise UserError(
                f"{name}: {reason}{why}; {len(self.lost)} of {self.shards} shards can't be read: "
                "put them right under the same names, and the same command goes on"
            )


# ---- Bytes --------------------------------------------------------------------------------------


def open_raw(name: str) -> BinaryIO:
    """A file on disk, or a temporary copy of what is behind http(s): going on where a connection
    broke. (fsspec asks for the length with HEAD, which signed addresses refuse, and starts again
    from nothing.)"""
    if not is_url(name):
        return open(os.path.expanduser(name), "rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (whoever asked for it closes it)
    most, failures, tag = 0, 0, None
    while True:
        asked = {"Accept-Encoding": "identity"}
        if here := copy.tell():  # If-Range: unless the file is another by now
            asked |= {"Range": f"bytes={here}-"} | ({"If-Range": tag} if tag else {})
        try:
            with requests.get(name, headers=asked, stream=True, timeout=TIMEOUT) as answer:
                accept(name, answer.status_code, answer.headers.get("Content-Type", ""))
                if answer.status_code != 206:  # all of it: no Range here, or a changed file
                    copy.seek(0)
                    copy.truncate()
                tag = answer.headers.get("ETag")
                while data := answer.raw.read(PIECE):
                    copy.write(data)
            copy.seek(0)
            return copy
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            failures, most = 0 if copy.tell() > most else failures + 1, max(most, copy.tell())
            if failures > RETRIES:
                raise UserError(f"{name} can't be read: {error}") from error
            time.sleep(min(30.0, 0.5 * 2**failures) if failures else 0.1)


def accept(url: str, status: int, kind: str) -> None:
    """Raise what an answer with this HTTP status and content type deserves."""
    if status == 404:
        raise FileNotFoundError("HTTP 404")
    if status in TRY_AGAIN:
        raise requests.ConnectionError(f"HTTP {status}")
    if status >= 400 or "text/html" in kind:  # a page: perhaps "please log in"
        # whoever refuses us here will refuse the other shards too
        what = f"HTTP {status}" if status >= 400 else "with a web page"
        how = "renew the address if it was signed and has expired, or give it what it asks for"
        raise UserError(f"{url} answers {what}: {how}; then the same command goes on")


def decompressed(raw) -> Iterator[bytes]:
    """The content of a gzip, zstd or plain file, told apart by its first bytes. (zstandard's own
    reader takes a file that was cut off for a whole one.)"""
    data, frame, packed, size = raw.read(4), None, 0, 0
    if data[:2] == b"\x1f\x8b":
        fresh: Callable = functools.partial(zlib.decompressobj, 31)
    elif data == b"\x28\xb5\x2f\xfd" or data[1:] == b"\x2a\x4d\x18":  # a frame, a skippable one
        fresh = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # --long=31
    else:
        yield data
        yield from iter(lambda: raw.read(PIECE), b"")
        return
    for read in chain([data], iter(lambda: raw.read(SIP), b"")):
        data, packed = read, packed + len(read)
        while data := data if frame else data.lstrip(b"\0"):  # padding between members
            frame = frame or fresh()
            piece = frame.decompress(data)
            size += len(piece)
            if size > BOMB[0] and size > BOMB[1] * packed:
                raise Damage("decompression bomb")
            for start in range(0, len(piece), PIECE):
                yield piece[start : start + PIECE]
            data = b""
            if frame.eof:  # another may follow
                data, frame = frame.unused_data, None
    if frame:
        raise Damage("truncated compression")


def lines(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line); None stands for a line that is too long to hold."""
    number, parts, size = 1, [], 0
    for piece in pieces:
        head, *rest = piece.split(b"\n")
        parts.append(head)
        size += len(head)
        for part in rest:
            yield number, b"".join(parts) if size <= MAX_LINE else None
            number, parts, size = number + 1, [part], len(part)
        if size > MAX_LINE:
            parts.clear()
    if size:
        yield number, b"".join(parts) if size <= MAX_LINE else None


# ---- Records ------------------------------------------------------------------------------------


def records(
    name: str, skips: Skips, start: int = 0, fields: Collection[str] | None = None
) -> Iterator[tuple[int, dict]]:
    """(line, object) for each line after `start`; plain text comes as passages under "text". Of a
    parquet file only the columns named in `fields` are read (the others are None), or all."""
    kind, number = ending(name), start
    rows: Iterator[tuple[int, dict | str]]
    try:
        with open_raw(name) as raw:
            if kind == ".parquet":
                rows = parquet_rows(raw, start, fields)
            else:
                numbered = lines(decompressed(raw))
                later = ((number, line) for number, line in numbered if number > start)
                rows = passages(later) if kind == ".txt" else json_lines(later)
            for number, record in rows:
                if isinstance(record, dict):
                    yield number, record
                else:
                    skips.note(record, f"{name}:{number}")
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = tempfile.gettempdir()
            raise UserError(f"{where} is full: set TMPDIR to another disk") from None
        skips.lose(name, number, error)


def json_lines(numbered) -> Iterator[tuple[int, dict | str]]:
    """The object on each line, or the reason why there is none."""
    for number, line in numbered:
        if line is None:
            yield number, "line too long"
        elif line not in (b"", b"\r"):
            try:
                record = json.loads(line.decode("utf-8-sig"))
                yield number, record if isinstance(record, dict) else "not a JSON object"
            except UnicodeDecodeError:
                yield number, "invalid UTF-8"
            except (ValueError, RecursionError):
                yield number, "damaged line"


def passages(numbered) -> Iterator[tuple[int, dict | str]]:
    """Plain text in documents of about PASSAGE bytes that end at a blank line (or get too long)."""
    held, number = b"", 0
    for number, line in numbered:
        if line is None:
            yield number, "line too long"
            continue
        held += line + b"\n"
        if (len(held) >= PASSAGE and not line.strip()) or len(held) >= 8 * PASSAGE:
            yield number, {"text": held.strip(b"\n")}
            held = b""
    if held:
        yield number, {"text": held.strip(b"\n")}


def parquet_rows(file, start: int, fields: Collection[str] | None) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    try:
        table, number = pyarrow.parquet.ParquetFile(file), 0
        names = table.schema_arrow.names
        used = [name for name in names if fields is None or name in fields]
        refuse_bombs(table.metadata, used)
        for batch in table.iter_batches(batch_size=16, columns=used or names[:1]):
            columns = {name: values(batch.column(name)) for name in used}
            for row in range(batch.num_rows):
                number += 1
                if number > start:
                    found = {name: column[row] for name, column in columns.items()}
                    yield number, dict.fromkeys(names) | found
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def refuse_bombs(metadata, used: list[str]) -> None:
    """Raise if a column of a row group is out of all proportion to its bytes in the file."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size = column.total_uncompressed_size
            large = size > ROW_GROUP and size > BOMB[1] * column.total_compressed_size
            if large and column.path_in_schema.split(".")[0] in used:
                raise Damage("decompression bomb")


def values(column) -> list:
    """A column in Python. Where it holds what Python can't (the year 10,000, text that is not
    UTF-8), as bytes, or else as nothing."""
    for cast in (lambda: column, lambda: column.cast("binary")):
        with contextlib.suppress(ValueError, OverflowError, NotImplementedError, ImportError):
            return cast().to_pylist()
    return [None] * len(column)


def text_of(record: dict, field: str | None) -> tuple[str | None, str]:
    """(text, "") or (None, why there is none)."""
    names = [field] if field else TEXT_FIELDS
    value = next((record[name] for name in names if name in record), record)
    if value is record:
        return None, "missing field"
    if isinstance(value, bytes):  # of a parquet file
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None, "invalid UTF-8"
    if not isinstance(value, str):
        return None, "text is not a string"
    if not value:
        return None, "empty text"
    if "\0" in value:
        return None, "NUL in text"
    if not value.isascii():  # half a surrogate pair can't be encoded
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value, ""


def as_object(value) -> dict:
    """An object, or the JSON of one, as in the Hugging Face export; {} where it is neither."""
    try:
        value = json.loads(value) if isinstance(value, str | bytes) else value
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- Corpora ------------------------------------------------------------------------------------


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def ending(name: str) -> str:
    """.jsonl for data/part-3.jsonl.zst?download=true"""
    path = Path(urlsplit(name).path if is_url(name) else name)
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def list_files(source: str, where: str = "") -> list[str]:
    """The shards that a path, glob, folder, URL, list file or comma-separated mix of them names.

    where: the list file that source is a line of; its names may be relative to its own folder.
    UserError where a name stands for nothing."""
    names = []
    whole = not is_url(source) and bool(found(source, where))  # a comma may be part of a name
    for part in [source] if whole else filter(None, map(str.strip, source.split(","))):
        places = [part] if is_url(part) else found(part, where)
        if not places:
            listed = f" (a line of {where})" if where else ""
            raise UserError(f"no such file, folder or pattern: {part}{listed}")
        for place in places:
            rows = listed_in(place)
            if rows and where:
                raise UserError(f"{where}: lists within lists; name the shards of {place} in it")
            names += [name for row in rows for name in list_files(row, place)]
            names += shards_below(place) if os.path.isdir(place) else [] if rows else [place]
    if not names:
        raise UserError(f"no shard ({', '.join(ENDINGS)}, also compressed) in {source}")
    return names


def found(name: str, where: str = "") -> list[str]:
    """What a name or pattern stands for, from here or else from the folder of the list `where`."""
    name = os.path.expanduser(name)
    for place in (name, os.path.join(os.path.dirname(where), name)):
        if os.path.exists(place):
            return [place]
        if files := sorted(filter(os.path.isfile, glob.glob(place, recursive=True))):
            return files
    return []


def shards_below(folder: str) -> list[str]:
    """Without the files that RedPajama-V2 keeps beside its documents, and without lists of them."""
    inside = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True))
    beside = re.compile(r"\.(signals|duplicates|minhash)\.[^/]*$")
    shards = [name for name in inside if ending(name) in ENDINGS and not beside.search(name)]
    return [name for name in shards if os.path.isfile(name) and not listed_in(name)]


def listed_in(name: str) -> list[str]:
    """The lines of a .txt file that is a list of shards, but for comments; nothing of a text.

    Most of the first lines of a list are URLs, end as a shard does or name something on disk."""
    if not name.lower().endswith(".txt") or not os.path.isfile(name):
        return []
    with open(name, encoding="utf-8-sig", errors="surrogateescape") as file:  # names in any bytes
        stripped = map(str.strip, iter(lambda: file.readline(1 << 16), ""))
        rows = (row for row in stripped if row and not row.startswith("#"))
        first = list(islice(rows, 20))
        names = [row for row in first if "\0" not in row]
        sure = sum(is_url(r) or ending(r) in ENDINGS or bool(found(r, name)) for r in names)
        return [*first, *rows] if 2 * sure > len(first) else []


class Files:
    """The documents of a corpus on disk or on the web, its shards in an order keyed by the seed."""

    def __init__(self, source: str, skips: Skips, text_field: str | None = None, seed: int = 0):
        self.source, self.skips, self.text_field, self.seed = source, skips, text_field, seed
        self.names = list_files(source)
        skips.shards = len(self.names)
        # a signed address may be renewed
        bare = [urlsplit(name).path if is_url(name) else name for name in self.names]
        self.mark = zlib.crc32(os.fsencode("\n".join(map(os.path.basename, bare))))

    def documents(self, start: dict) -> Iterator[tuple[str, dict]]:
        """(text, position) to the end of an epoch; documents(position) goes on after that text."""
        epoch, first, line = start["epoch"], start["shard"], start["line"]
        if start["files"] != self.mark:
            raise UserError(f"the files of {self.source} are not those that the run began with")
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.names))
        fields = [self.text_field] if self.text_field else TEXT_FIELDS
        misses = 0
        for shard in range(first, len(order)):
            name = self.names[order[shard]]
            for number, record in records(name, self.skips, line, fields):
                text, reason = text_of(record, self.text_field)
                misses = misses + 1 if text is None else 0
                if misses == PATIENCE:
                    shown = repr(", ".join(record))[1:-1]
                    raise UserError(f"no text in {name} ({reason}); its fields: {shown}")
                if text is None:
                    self.skips.note(reason, f"{name}:{number}")
                else:
                    yield text, self.beginning(epoch) | {"shard": shard, "line": number}
            line = 0

    def beginning(self, epoch: int) -> dict:
        return {"epoch": epoch, "shard": 0, "line": 0, "files": self.mark}
