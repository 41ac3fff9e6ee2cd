"""A long run under faults, watched from outside: 2,000 steps, or STEPS.

    PYTHONPATH=. python tests/soak.py BASE [STEPS]

BASE is a Hugging Face folder of the pocket world, such as RUN/base/ckpt. One request in ten fails,
in every way of faulty_server.py. Memory, open files and threads of train.py are sampled each second
by the step it has reached; after a warm-up they must be flat: memory within 5 %.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nursery
from faulty_server import TRANSPORT, faulty_server, world_teacher

KEYS = dict(batch_size=2, rollouts=2, baseline=False, eval_prefixes=0, overlap=1, timeout=0.5)
KEYS |= dict(example_every=10**6, save_every=100)
ALLOWED = dict(memory=1.05, files=1.05, threads=1.0)  # last tenth / first tenth after the warm-up


def sample(pid: int) -> dict:
    """Resident memory in MB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    memory, threads = int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])
    return dict(memory=memory, files=len(os.listdir(f"/proc/{pid}/fd")), threads=threads)


def watch(run: nursery.Run, log: Path, steps: int) -> list[dict]:
    samples = []
    while run.alive():
        with contextlib.suppress(OSError, KeyError):  # it has not begun, or has just ended
            step = log.read_bytes().count(b"\n")
            samples.append({"step": step, **sample(run.processes[0].pid)})
        time.sleep(1)
    assert run.wait() == 0 and samples[-1]["step"] > 0.9 * steps
    return [each for each in samples if steps // 10 <= each["step"] < steps]


def main(base: str, steps: int = 2000):
    with (
        tempfile.TemporaryDirectory() as folder,
        faulty_server(plan=TRANSPORT, share=0.1, answer=world_teacher) as server,
    ):
        keys = KEYS | dict(out_dir=f"{folder}/run", init_from=base, max_steps=steps)
        keys |= dict(judge_url=server.url, rewrite_url=server.url)
        run = nursery.Run([f"--{name}={value}" for name, value in keys.items()])
        samples = watch(run, Path(folder) / "run" / "log.jsonl", steps)
        lines = nursery.log_of(f"{folder}/run")
    print(f"{len(lines)} steps, requests: {dict(server.counts)}")
    print(f"updates not finite: {sum(line['not_finite'] for line in lines):.0f}")
    # The files of a step's checkpoint and the sockets in flight come and go: means of tenths.
    for name, allowed in ALLOWED.items():
        seen, tenth = [each[name] for each in samples], len(samples) // 10
        before, after = sum(seen[:tenth]) / tenth, sum(seen[-tenth:]) / tenth
        print(f"{name}: {before:.1f} after warm-up, {after:.1f} at the end: {after / before:.3f}")
        assert after <= before * allowed + (name == "files"), name


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
