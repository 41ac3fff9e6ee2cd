"""What a run must not lose, in SQLite: a file for each process, on whatever file system.

In: rows, through `await Store.add(...)`, which returns once they are committed: a process that is
killed then has lost nothing. Out: rows again (`find`), also those that earlier processes left.

SQLite's WAL mode is quick, survives kill -9 and asks that all who open a file are on one machine.
So NAME.sqlite belongs to process 0, NAME.1.sqlite to process 1 and so on. When a run goes on with
another number of processes, `settle` puts the files aside as NAME.past1.sqlite, ...: nobody writes
these any more, so that every process on every machine may read them.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
import zlib
from concurrent.futures import Future
from pathlib import Path

from support.command import UserError

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that another process may hold a file
HOST = zlib.crc32(socket.gethostname().encode()) >> 1  # kept in each file: who writes it


def path_of(path: Path, process: int) -> Path:
    """The file of one process (torchrun's rank)."""
    return path.with_suffix(f".{process}{path.suffix}") if process else path


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The processes' files in order, and those of the past, the latest first."""
    name, _, _ = path.name.partition(".")
    found: dict[str, list] = {"": [], "past": []}
    for file in path.parent.glob(f"{name}.*sqlite"):
        if match := re.fullmatch(r"\.(past)?(\d*)\.?sqlite", file.name[len(name) :]):
            found[match[1] or ""].append((int(match[2] or 0), file))
    return [f for _, f in sorted(found[""])], [f for _, f in sorted(found["past"], reverse=True)]


def settle(path: Path, processes: int) -> None:
    """Before any process opens its file: where another number of processes wrote them, all become
    files of the past. To be called by one process alone, for which the others wait."""
    files, past = files_of(path)
    with contextlib.closing(open_file(path)) as db:
        before = db.execute("PRAGMA user_version").fetchone()[0] or 1
    if files and before != processes:
        for number, file in enumerate(reversed(files), len(past) + 1):  # last that of process 0
            with contextlib.closing(open_file(file)) as db:
                db.execute("PRAGMA journal_mode=DELETE")
            file.rename(path.with_suffix(f".past{number}{path.suffix}"))
    with contextlib.closing(open_file(path)) as db:
        db.execute(f"PRAGMA user_version={processes}")


class Reader:
    """All files of a run, to be read: those of a finished run, or of one that is going on."""

    def __init__(self, path: Path):
        files, past = files_of(path)
        if not files + past:
            raise UserError(f"{path}: no such file: is this the folder of a run with a judge?")
        self._open = contextlib.ExitStack()
        self.connections = [self._open.enter_context(reading(file)) for file in files + past]

    def find(self, query: str, arguments: tuple = ()) -> tuple | None:
        """The first row of the first file that has one."""
        for db in self.connections:
            with contextlib.suppress(sqlite3.OperationalError):  # a past file may lack the table
                if row := db.execute(query, arguments).fetchone():
                    return row
        return None

    def rows(self, query: str) -> list[sqlite3.Cursor]:
        """One cursor for each file that has the table, in the order in which `find` looks."""
        found = []
        for db in self.connections:
            with contextlib.suppress(sqlite3.OperationalError):
                found.append(db.execute(query))
        return found

    def close(self) -> None:
        self._open.close()


class Store(Reader):
    """The file of this process, to be written and read; and the files of the past, to be read.

    One connection for all threads and event loops of the process: see `open_store`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open = contextlib.ExitStack()
        self._db = self._open.enter_context(contextlib.closing(open_file(path)))
        past = [self._open.enter_context(reading(file)) for file in files_of(path)[1]]
        self.connections = [self._db, *past]
        self.users = 0
        self._lock = threading.RLock()
        self._rows: list = []  # of the next commit
        self._committed: Future = Future()

    def create(self, table: str) -> None:
        with self._lock, self._db:
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    async def add(self, query: str, *rows: tuple) -> None:
        """Returns once the rows are committed, together with all that came at the same time."""
        with self._lock:
            if not self._rows:
                self._committed = Future()
                asyncio.get_running_loop().call_soon(self.commit)
            self._rows += [(query, row) for row in rows]
            committed = self._committed
        await asyncio.shield(asyncio.wrap_future(committed))  # one who gives up harms no other

    def commit(self) -> None:
        with self._lock:
            rows, self._rows = self._rows, []
            if not rows:
                return
            try:
                with self._db:
                    for query, row in rows:
                        self._db.execute(query, row)
            except sqlite3.Error as error:  # a full disk: whoever waits shall know
                self._committed.set_exception(error)
            else:
                self._committed.set_result(None)

    def close(self) -> None:
        with _guard:
            self.commit()
            self.users -= 1
            if not self.users:
                _stores.pop(self.path)
                super().close()


_warned: set[Path] = set()  # folders
_guard = threading.Lock()
_stores: dict[Path, Store] = {}  # those that are open


def open_store(path: Path) -> Store:
    """The process's Store of this file, which judge and rewriter share; each user closes it."""
    with _guard:
        key = path.absolute()
        if key not in _stores:
            _stores[key] = Store(key)
        _stores[key].users += 1
        return _stores[key]


def open_file(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode, where a commit costs no wait for the disk; else in another mode,
    slower or without locks, and a warning says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tries = [("WAL", ""), ("DELETE", ""), ("DELETE", "?nolock=1")]
    if not locks_work(path.parent):
        tries = tries[2:]
    for mode, options in tries:
        try:
            db = connect(path, mode, options)
            break
        except sqlite3.OperationalError as e:
            if (mode, options) == tries[-1] or ("locked" in str(e) and mode == "DELETE"):
                raise
    first = path.parent not in _warned and not re.search(r"\.\d+\.", path.name)
    if (mode, options) != ("WAL", "") and first:
        _warned.add(path.parent)
        how = "keep other commands away: it has no locks" if options else "another is slower"
        log.warning("%s: this file system does not carry SQLite's WAL mode; %s", path, how)
    return db


def connect(path: Path, mode: str, options: str) -> sqlite3.Connection:
    """SQLite waits for other processes itself, except while one of them switches the mode: then it
    says "locked" at once, and we wait."""
    address = f"{path.absolute().as_uri()}{options}"
    db = sqlite3.connect(address, timeout=PATIENCE, check_same_thread=False, uri=True)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if db.execute("PRAGMA application_id").fetchone()[0] != HOST:
                db.execute(f"PRAGMA application_id={HOST}")
            (now,) = db.execute(f"PRAGMA journal_mode={mode}").fetchone()
            if now.upper() != mode:
                raise sqlite3.OperationalError(f"journal_mode is {now}")
            db.execute("PRAGMA synchronous=NORMAL")
            return db
        except sqlite3.OperationalError as e:
            if "locked" not in str(e) or time.monotonic() > until:
                db.close()
                raise
        except sqlite3.DatabaseError as e:
            db.close()
            raise UserError(f"{path}: {e}: move it away; what it holds will be asked again") from e
        time.sleep(0.05)


def locks_work(folder: Path) -> bool:
    """Whether the file system has the locks that SQLite takes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def reading(path: Path):
    """A connection that changes nothing. What another machine may be writing is read from a copy:
    to open it in place would break SQLite's rule."""
    wal = path.with_name(f"{path.name}-wal")
    with contextlib.ExitStack() as stack:
        where = path
        if wal.exists() and wal.stat().st_size and not written_here(path):
            where = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
            for file in (wal, path):
                shutil.copy(file, where.with_name(file.name))
        # A file without a log beside it is whole; on a read-only disk it opens only as immutable.
        still = not wal.exists() and (".past" in path.name or not os.access(path.parent, os.W_OK))
        address = f"{where.absolute().as_uri()}?mode=ro"
        if still:
            address += "&immutable=1"
        elif where == path and not locks_work(path.parent):
            address += "&nolock=1"
        db = sqlite3.connect(address, timeout=PATIENCE, check_same_thread=False, uri=True)
        with contextlib.closing(db):
            yield db


def written_here(path: Path) -> bool:
    """Whether this machine wrote the file last; so too for a file that says nothing about it."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(72)[68:72], "big") in (0, HOST)
