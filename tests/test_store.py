"""A store for each process, on whatever file system; all of them read again."""

import asyncio
import fcntl
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from unittest.mock import Mock

import pytest

from support import store as stores
from support.command import UserError
from support.store import Reader, Store, files_of, open_file, path_of, settle

INSERT = "INSERT OR REPLACE INTO words VALUES (?)"


def write(path, *words):
    with closing(Store(path)) as store:
        store.create("words (word TEXT PRIMARY KEY)")

        async def add():
            await asyncio.gather(*(store.add(INSERT, (word,)) for word in words))

        asyncio.run(add())


def words_of(store):
    return [word for rows in store.rows("SELECT word FROM words") for (word,) in rows]


def test_processes_may_open_a_new_store_at_once(tmp_path):
    """Three at a time: SQLite's own waiting does not cover the change to WAL mode."""
    together = threading.Barrier(3)

    def open_all(_):
        for i in range(100):
            together.wait(10)
            open_file(tmp_path / str(i)).close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_all, range(3)))


def test_judge_and_rewriter_write_one_file_side_by_side(tmp_path):
    path = tmp_path / "x.sqlite"
    parts = [[f"{thread} {i}" for i in range(200)] for thread in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda words: write(path, *words), parts))
    with closing(Store(path)) as store, closing(Reader(path)) as reader:  # of a run that goes on
        assert sorted(words_of(store)) == sorted(words_of(reader)) == sorted(sum(parts, []))
        assert store.find("SELECT 1 FROM words WHERE word = ?", "3 7") == (1,)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (2, 4, 2), (1, 2, 1, 3)])
def test_every_process_finds_what_another_number_of_processes_left(tmp_path, numbers):
    path = tmp_path / "judgments.sqlite"
    for launch, processes in enumerate(numbers):
        for _ in range(2):  # the second time nothing has changed
            settle(path, processes)
            for process in range(processes):
                write(path_of(path, process), f"{launch} {process}")
    earlier = [f"{i} {p}" for i, n in enumerate(numbers[:-1]) for p in range(n)]
    last = [f"{len(numbers) - 1} {process}" for process in range(numbers[-1])]
    for process, mine in enumerate(last):
        with closing(Store(path_of(path, process))) as store:
            assert sorted(words_of(store)) == sorted([*earlier, mine])
    with closing(Reader(path)) as reader:
        assert sorted(words_of(reader)) == sorted(earlier + last)
    assert files_of(path)[0] == [path_of(path, p) for p in range(numbers[-1])]


@pytest.mark.parametrize("lacks", ["WAL", "locks"])
def test_a_file_system_without_locks_gets_a_warning_and_a_run(tmp_path, monkeypatch, caplog, lacks):
    connect, path = sqlite3.connect, tmp_path / "x.sqlite"

    class Poor(sqlite3.Connection):
        def execute(self, query, *rest):
            if query == "PRAGMA journal_mode=WAL" or (lacks == "locks" and not self.lockless):
                raise sqlite3.OperationalError("locking protocol")
            return super().execute(query, *rest)

    def poor(address, **how):
        db = connect(address, factory=Poor, **how)
        db.lockless = "nolock" in address
        return db

    monkeypatch.setattr(stores.sqlite3, "connect", poor)
    if lacks == "locks":
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(37, "No locks available")))
    write(path, "kept")
    monkeypatch.undo()
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    assert ("no locks" in caplog.messages[0]) == (lacks == "locks")
    with closing(Reader(path)) as reader:
        assert words_of(reader) == ["kept"]


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.sqlite: no such file"):
        Reader(tmp_path / "no.sqlite")
    (tmp_path / "x.sqlite").write_text("not a database, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match=r"x\.sqlite: .* move it away"):
        Store(tmp_path / "x.sqlite")
