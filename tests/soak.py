"""A long run under faults, watched from outside: 2,000 steps, or STEPS.

    PYTHONPATH=. python tests/soak.py BASE [STEPS]

BASE is a Hugging Face folder of the pocket world, such as RUN/base/ckpt. One request in ten fails,
in every way of faulty_server.py. Memory, open files and threads of train.py are sampled each second
by the step it has reached; after a warm-up they must be flat: memory within 5 %.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faulty_server import TRANSPORT, faulty_server

from support.command import python
from support.files import read_jsonl
from world import teacher

KEYS = dict(batch_size=2, rollouts=2, baseline=False, eval_prefixes=0, overlap=1, timeout=0.5)
KEYS |= dict(example_every=10**6, save_every=100)


def truth(request: dict) -> str:
    return teacher.answer(request["messages"][0]["content"], request["seed"])


def sample(pid: int) -> dict:
    """Resident memory in MB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    memory, threads = int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])
    return dict(memory=memory, files=files, threads=threads)


def steps_done(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def watch(process, log: Path, steps: int) -> list[dict]:
    samples = []
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):  # it has just ended
            samples.append({"step": steps_done(log), **sample(process.pid)})
        time.sleep(1)
    assert process.returncode == 0 and steps_done(log) == steps
    return samples


def main(base: str, steps: int):
    with (
        tempfile.TemporaryDirectory() as folder,
        faulty_server(plan=TRANSPORT, share=0.1, answer=truth) as server,
    ):
        keys = KEYS | dict(out_dir=f"{folder}/run", init_from=base, max_steps=steps)
        keys |= dict(judge_url=server.url, rewrite_url=server.url)
        flags = [f"--{name}={value}" for name, value in keys.items()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        command = [*python("train"), *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        log = Path(folder) / "run" / "log.jsonl"
        samples = watch(process, log, steps)
        lines = list(read_jsonl(log))
        faults = sum(n for kind, n in server.counts.items() if kind != "answer")
        took = time.monotonic() - began
        print(f"{steps} steps in {took:.0f} s, {server.counts['answer']} answers")
        print(f"{faults} faults: {dict(server.counts)}")
        print(f"updates not finite: {sum(line['not_finite'] for line in lines):.0f}")
    # The files of a step's checkpoint and the sockets in flight come and go: means of tenths.
    rest = [each for each in samples if steps // 10 <= each["step"] < steps]
    tenths = [rest[len(rest) * i // 10 : len(rest) * (i + 1) // 10] for i in range(10)]
    for part in tenths:
        means = {name: sum(each[name] for each in part) / len(part) for name in part[0]}
        print("  ".join(f"{name} {value:.1f}" for name, value in means.items()))
    first, last = tenths[0], tenths[-1]
    for name, allowed in {"memory": 1.05, "files": 1.05, "threads": 1.0}.items():
        before, after = (sum(each[name] for each in part) / len(part) for part in (first, last))
        print(f"{name}: {before:.1f} after warm-up, {after:.1f} at the end: {after / before:.3f}")
        assert after <= before * allowed + (1 if name == "files" else 0), name


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
