"""What every command shares: mistakes as one line, Ctrl-C where it can be saved, child processes.

In: a `main`. Out: a process whose foreseen ends are one line on stderr and an exit code; the first
SIGINT or SIGTERM is heard by `check` and `wait`, the second SIGINT ends the process at once.
"""

import contextlib
import io
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED, TEMPORARY, INTERRUPTED = 1, 75, 130  # exit codes; 75: the same command may go on later


class UserError(ValueError):
    """A mistake that its user can mend: the message names the file, line, key or URL, and how."""


class Stopped(Exception):
    """The run ends before its time and is saved; the same command goes on with it."""

    code = TEMPORARY


class Interrupted(Stopped):
    """SIGINT or SIGTERM."""

    code = INTERRUPTED


def exit_code(main: Callable[[list[str]], object]) -> int:
    """main(arguments of the command line), its foreseen ends as one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no text of a corpus may end the run
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Stopped as e:
        return end(f"{e}: the run is saved, the same command goes on with it", e.code)
    except KeyboardInterrupt:
        return end("interrupted: the same command goes on with what is saved", INTERRUPTED)
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, sqlite3.Error) as e:
        return end(f"error: {e}", FAILED)


def run(main: Callable[[list[str]], object]):
    sys.exit(exit_code(main))


def end(line: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0" or code == FAILED:  # else the first process says it
        print(line, file=sys.stderr)
    return code


# ---- Signals ------------------------------------------------------------------------------------

_asked = threading.Event()


def check():
    """Raises Interrupted once a signal has arrived. Call it where the work can be saved."""
    if _asked.is_set():
        raise Interrupted("interrupted")


def wait(future: futures.Future):
    """future.result(), hearing signals meanwhile."""
    while not futures.wait([future], 0.2).done:
        check()
    return future.result()


@contextlib.contextmanager
def listening():
    """Within, a signal makes `check` raise instead of striking anywhere.

    A second SIGINT ends the process whatever it does, also in native code, where no Python handler
    is run: the C handler writes each signal to a pipe that a thread reads. torchrun sends a child
    the SIGINT which the terminal has sent it already, so copies are known by their haste.
    """
    echo = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.25  # seconds
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch():
        first = None
        while number := os.read(reader, 1):
            now = time.monotonic()
            if number[0] == signal.SIGINT and first is not None and now - first > echo:
                os.write(2, b"interrupted again: ended without saving\n")
                os._exit(INTERRUPTED)
            first = first or now
        os.close(reader)

    _asked.clear()
    before = {n: signal.signal(n, lambda *_: _asked.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        _asked.clear()


# ---- Child processes ----------------------------------------------------------------------------


def python(module: str, *arguments) -> list[str]:
    """The command that runs `python -m module` of this repository, from whatever folder."""
    start = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
    start += f"sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", start, *map(str, arguments)]


@contextlib.contextmanager
def running(command: list[str]):
    """A server in a process of its own, which by --parent ends with this one; gives the URL that it
    prints first."""
    command, pipe = [*command, f"--parent={os.getpid()}"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            if not (url := process.stdout.readline().strip()):  # type: ignore[union-attr]
                raise UserError(f"a server did not start; try it by hand: {shlex.join(command)}")
            yield url
        finally:
            process.kill()  # it keeps nothing
