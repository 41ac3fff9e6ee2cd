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
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from support.command import UserError

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that another process may hold a file
LOCK = threading.RLock()  # a process has one hand: its stores may lie where files have no locks
WARNED: set[Path] = set()  # folders


def path_of(path: Path, process: int) -> Path:
    """The file of one process (torchrun's rank)."""
    return path.with_suffix(f".{process}{path.suffix}") if process else path


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The processes' files in order, and those of the past, the latest first."""
    found: dict[str, list] = {"": [], "past": []}
    name, _, _ = path.name.partition(".")
    for file in path.parent.glob(f"{name}.*sqlite"):
        if match := re.fullmatch(r"\.(past)?(\d*)\.?sqlite", file.name[len(name) :]):
            found[match[1] or ""].append((int(match[2] or 0), file))
    return [f for _, f in sorted(found[""])], [f for _, f in sorted(found["past"], reverse=True)]


def settle(path: Path, processes: int) -> None:
    """Before any process opens its file: where another number of processes wrote them, all become
    files of the past. To be called by one process alone, for which the others wait."""
    files, past = files_of(path)
    if files != [path_of(path, process) for process in range(processes)]:
        for number, file in enumerate(reversed(files), len(past) + 1):  # last that of process 0
            with contextlib.closing(open_file(file)) as db:
                db.execute("PRAGMA journal_mode=DELETE")
            file.rename(path.with_suffix(f".past{number}{path.suffix}"))


class Reader:
    """All files of a run, to be read: those of a finished run, or of one that is going on."""

    def __init__(self, path: Path):
        files, past = files_of(path)
        if not files + past:
            raise UserError(f"{path}: no such file: is this the folder of a run with a judge?")
        self.connections = [open_to_read(file) for file in files + past]

    def rows(self, query: str, *arguments) -> Iterator[sqlite3.Cursor]:
        """A cursor for each file that has the table: the process's own or process 0's first."""
        for db in self.connections:
            try:
                yield db.execute(query, arguments)
            except sqlite3.OperationalError as e:
                if "no such table" not in str(e):  # which a past file may lack
                    raise

    def find(self, query: str, *arguments) -> tuple | None:
        """The first row of the first file that has one."""
        with LOCK:
            return next((row for rows in self.rows(query, *arguments) for row in rows), None)

    def close(self) -> None:
        for db in self.connections:
            db.close()


class Store(Reader):
    """The file of this process, to be written and read; and the files of the past, to be read."""

    def __init__(self, path: Path):
        self.connections = [open_file(path), *map(open_to_read, files_of(path)[1])]
        self._rows: list = []  # of the next commit

    def create(self, table: str) -> None:
        with LOCK, self.connections[0] as db:
            db.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    async def add(self, query: str, *rows: tuple) -> None:
        """Returns once the rows are committed, together with all that came at the same time."""
        with LOCK:
            self._rows += [(query, row) for row in rows]
        await asyncio.sleep(0)
        self.commit()

    def commit(self) -> None:
        with LOCK:
            if not self._rows:  # another has committed ours with his
                return
            with self.connections[0] as db:  # on a full disk all is as before: each asker is told
                for query, row in self._rows:
                    db.execute(query, row)
            self._rows = []

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # who asked for it was told
            self.commit()
        super().close()


def open_file(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode, where a commit costs no wait for the disk; else in a slower mode,
    without locks where the file system has none, and one warning says so, of the first process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode, options = ("WAL", "") if locks_work(path.parent) else ("DELETE", "?nolock=1")
    address = f"{path.absolute().as_uri()}{options}"
    db = sqlite3.connect(address, timeout=PATIENCE, check_same_thread=False, uri=True)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0].upper() != mode:
                raise sqlite3.OperationalError(f"it has no journal_mode {mode}")
            db.execute("PRAGMA synchronous=NORMAL")
            break
        except sqlite3.OperationalError as e:
            locked = "locked" in str(e)  # for SQLite does not wait while another changes the mode
            if time.monotonic() > until if locked else mode == "DELETE":
                raise
            mode = mode if locked else "DELETE"
            time.sleep(0.05)
        except sqlite3.DatabaseError as e:
            raise UserError(f"{path}: {e}: move it away; what it holds will be asked again") from e
    if mode != "WAL" and path.parent not in WARNED and len(path.suffixes) == 1:
        WARNED.add(path.parent)
        how = "keep other commands away: it has no locks" if options else "another is slower"
        log.warning("%s: this file system does not carry SQLite's WAL mode; %s", path, how)
    return db


def locks_work(folder: Path) -> bool:
    """Whether the file system has the locks that SQLite takes."""
    with tempfile.TemporaryFile(dir=folder) as file, contextlib.suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing. A file without a log beside it is whole; one with it may
    be written meanwhile, and by SQLite's rule is to be read on the machine that writes it."""
    live = path.with_name(f"{path.name}-wal").exists()
    address = f"{path.absolute().as_uri()}?{'mode=ro' if live else 'immutable=1'}"
    return sqlite3.connect(address, timeout=PATIENCE, check_same_thread=False, uri=True)
