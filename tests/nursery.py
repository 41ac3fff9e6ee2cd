"""Starts train.py many times: imported once, forked for every run, so that a start costs 10 ms.

    with nursery() as born:
        run = born.start(["--max_steps=3"])       # or processes=2, as torchrun would start them
        run.kill()                                # SIGKILL to all of its processes
        run.wait()  -> exit code of the first     # then run.stdout, run.stderr

As a script it is the parent of the runs: a JSON object a line on stdin, a number a line on stdout.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Run:
    """The processes of one start of train.py; their output lies in two files."""

    def __init__(self, ask, folder: Path, argv: list, processes: int, file_limit: int | None):
        self.ask, self.files = ask, [folder / name for name in ("stdout", "stderr")]
        environment = {}
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        self.pids = []
        for number in range(processes):
            if processes > 1:
                place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes}
                environment |= {name: str(value) for name, value in place.items()}
            files = list(map(str, self.files))
            order = dict(argv=argv, environment=environment, files=files, file_limit=file_limit)
            self.pids.append(ask(order))

    def signal(self, number: int):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)

    def alive(self) -> bool:
        """Whether any of the processes has not ended; they stay zombies until `wait`."""
        states = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in self.pids)
        return any(state.split()[0] != "Z" for state in states)

    def wait(self) -> int:
        """-> the exit code, of the first process that failed if one did; minus a signal."""
        codes = [self.ask({"wait": pid}) for pid in self.pids]
        self.stdout, self.stderr = (file.read_text(errors="replace") for file in self.files)
        return next((code for code in codes if code), 0)


class Nursery:
    def __init__(self, process, folder: Path):
        self.process, self.folder, self.count = process, folder, 0

    def ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list, processes: int = 1, file_limit: int | None = None) -> Run:
        """file_limit: bytes after which a file cannot grow, as on a full disk."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return Run(self.ask, folder, list(map(str, argv)), processes, file_limit)


@contextlib.contextmanager
def nursery():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            yield Nursery(process, Path(folder))
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()


def child(train, order: dict):
    """One run of train.py, as `python train.py` would be. Never returns."""
    from support import command

    code = 1
    try:
        os.setsid()
        for number, name in enumerate(order["files"], 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"])
        if order["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (order["file_limit"],))
        sys.argv[1:] = order["argv"]
        code = command.exit_code(train.main)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    import train
    from tools import plot

    plot.plot_run = lambda run: run / "training.png"  # a second of a run of three
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            sys.stdout.flush()
            answer = os.fork()
            if not answer:
                child(train, order)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
