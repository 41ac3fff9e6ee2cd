"""A store for each process, on whatever file system; all of them read again."""

import asyncio
import fcntl
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from support import store as stores
from support.command import UserError
from support.store import Reader, files_of, open_file, open_store, path_of, settle

INSERT = "INSERT OR REPLACE INTO words VALUES (?)"


def write(path, *words):
    store = open_store(path)
    store.create("words (word TEXT PRIMARY KEY)")

    async def add():
        await asyncio.gather(*(store.add(INSERT, (word,)) for word in words))

    asyncio.run(add())
    store.close()


def knows(store, word):
    return store.find("SELECT 1 FROM words WHERE word = ?", (word,)) is not None


def test_processes_may_open_a_new_store_at_once(tmp_path):
    """Three at a time: SQLite's own waiting does not cover the change to WAL mode."""
    together = threading.Barrier(3)

    def open_all(_):
        for i in range(100):
            together.wait(10)
            open_file(tmp_path / str(i)).close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_all, range(3)))


def test_judge_and_rewriter_share_the_store_of_their_process(tmp_path):
    one, two = open_store(tmp_path / "x.sqlite"), open_store(tmp_path / "x.sqlite")
    one.close()
    assert one is two and two.find("SELECT 1") == (1,)
    two.close()
    with pytest.raises(sqlite3.ProgrammingError):
        two.find("SELECT 1")


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (2, 4, 2), (1, 2, 1, 3)])
def test_every_process_finds_what_another_number_of_processes_left(tmp_path, numbers):
    path = tmp_path / "judgments.sqlite"
    for launch, processes in enumerate(numbers):
        for _ in range(2):  # the second time nothing has changed
            settle(path, processes)
            for process in range(processes):
                write(path_of(path, process), f"{launch} {process}")
    earlier = [f"{i} {p}" for i, n in enumerate(numbers[:-1]) for p in range(n)]
    for process in range(numbers[-1]):
        store = open_store(path_of(path, process))
        mine = [f"{len(numbers) - 1} {process}"]
        assert all(knows(store, word) for word in earlier + mine)
        store.close()
    reader = Reader(path)
    found = sorted(row for rows in reader.rows("SELECT word FROM words") for row in rows)
    assert found == sorted((f"{i} {p}",) for i, n in enumerate(numbers) for p in range(n))
    reader.close()
    assert files_of(path)[0] == [path_of(path, p) for p in range(numbers[-1])]


def test_a_store_of_the_version_before_is_that_of_one_process(tmp_path):
    path = tmp_path / "judgments.sqlite"
    write(path, "old")
    settle(path, 1)
    assert files_of(path) == ([path], [])
    settle(path, 2)
    store = open_store(path_of(path, 1))
    assert knows(store, "old")
    store.close()


@pytest.mark.parametrize(
    "lacks, message", [("WAL", "locking protocol"), ("locks", "disk I/O error")]
)
def test_a_file_system_without_locks_gets_a_warning_and_a_run(
    tmp_path, monkeypatch, caplog, lacks, message
):
    connect = sqlite3.connect

    class Poor(sqlite3.Connection):
        def execute(self, query, *rest):
            if query == "PRAGMA journal_mode=WAL" or (lacks == "locks" and not self.lockless):
                raise sqlite3.OperationalError(message)
            return super().execute(query, *rest)

    def poor(address, **how):
        db = connect(address, factory=Poor, **how)
        db.lockless = "nolock" in address
        return db

    monkeypatch.setattr(stores.sqlite3, "connect", poor)
    write(tmp_path / "x.sqlite", "kept")
    monkeypatch.undo()
    assert len(caplog.messages) == 1 and str(tmp_path / "x.sqlite") in caplog.messages[0]
    reader = Reader(tmp_path / "x.sqlite")
    assert knows(reader, "kept")
    reader.close()


def test_locks_that_the_system_refuses(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    write(tmp_path / "x.sqlite", "kept")
    assert len(caplog.messages) == 1 and "no locks" in caplog.messages[0]


def test_what_another_machine_may_be_writing_is_read_from_a_copy(tmp_path, monkeypatch):
    path = tmp_path / "judgments.sqlite"
    with closing(open_file(path)) as live:
        live.execute("CREATE TABLE words (word TEXT PRIMARY KEY)")
        live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        live.execute(INSERT, ("late",))
        live.commit()
        monkeypatch.setattr(stores, "HOST", 7)
        before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        reader = Reader(path)
        assert knows(reader, "late")
        (opened,) = (
            reader.connections[0].execute("SELECT file FROM pragma_database_list").fetchone()
        )
        assert not opened.startswith(str(tmp_path))
        reader.close()
        assert before == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.sqlite: no such file"):
        Reader(tmp_path / "no.sqlite")
    (tmp_path / "x.sqlite").write_text("not a database, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match=r"x\.sqlite: .* move it away"):
        open_store(tmp_path / "x.sqlite")
