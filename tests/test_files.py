"""A file is whole, old or new, whenever its writer is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.files import write_text


def test_a_write_that_dies_anywhere_leaves_the_old_file_or_the_new(tmp_path):
    """Killed before its 1st, 2nd, ... change to the disk, until it gets through."""
    path, old, new = tmp_path / "config.json", "old " * 10_000, "new " * 10_000
    for fatal in range(1, 10):
        path.write_text(old)
        pid = os.fork()
        if not pid:
            count = 0

            def die(event, _, fatal=fatal):
                nonlocal count
                if event in ("open", "os.rename"):
                    count += 1
                    if count == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            write_text(path, new)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert path.read_text() == (new if code == 0 else old)
        if code == 0:
            break
    assert fatal == 4  # it opens the file, opens it to flush it, and renames it
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_config_is_read_before_torch():
    """`--help` and mistakes are answered at once."""
    code = "import sys, config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
