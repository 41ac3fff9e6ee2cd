"""Self-improving pretraining (arXiv 2601.21343): one prefix, many continuations, a reward for each.

    python train.py                                  the pocket world on a laptop, minutes
    torchrun --nproc_per_node=8 train.py configs/paper.py configs/table1_quality.py \\
        --data='slimpajama/*.jsonl.zst' --init_from=MODEL \\
        --judge_url=http://HOST:8000/v1 --judge_model=NAME    a row of the paper, 8 GPUs

In: documents, an initial policy, teachers behind HTTP. Out: a run folder with config.json,
log.jsonl (an object a step), checkpoints and `ckpt` (a Hugging Face folder), judgments.sqlite,
summary.json and training.png. Keys: `python train.py --help`, explained in config.py.
"""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import config as configuration
from config import Config, names
from support.command import Interrupted, UserError

if __name__ == "__main__":  # --help and mistakes are answered before torch, which takes seconds
    try:
        configuration.parse(sys.argv[1:])
    except UserError as e:
        sys.exit(f"error: {e}")
    if not importlib.util.find_spec("torch"):
        sys.exit("error: this Python has no PyTorch: source .venv/bin/activate")

import torch
import torch.distributed as dist
from tqdm import tqdm

from asking import Teachers
from candidates import ask, autocast, make_pool, pack, rewards_of, unpack
from chat import TeacherGone
from data import Stream
from evaluation.evaluate import evaluate
from evaluation.results import table
from evaluation.sets import held_out_sets
from judge import load_prompts
from model import Llama, load_model, preset, read_config
from support import checkpoint
from support.distributed import agreed, gather, rank, start, world_size
from support.files import write_text
from support.monitors import Monitors
from support.runlog import Collapse, describe, open_log, report, show_example
from support.shard import load_optimizer, shard, whole, whole_model
from support.sources import list_files
from support.tokenizer import load_tokenizer
from teachers.tasks import Rows, TaskStream, evaluate_task, held_out_stream
from tools.cost import estimate
from tools.plot import plot_run
from update import make_optimizer, update
from world.corpus import Dials, WorldSource, parse_dials
from world.teacher import start_teacher

BAD_STEPS = 5  # updates in a row that are not finite end a run
EXIT_INTERRUPTED, EXIT_TEACHER_GONE = 130, 75  # 75: a temporary failure, the same command goes on


def train(policy, reference, source, teachers, config: Config, tokenizer, state, begin, label):
    """The loop, in the paper's order: prefixes, candidates, judgments, update.

    state: what the newest checkpoint of this phase held, or None; begin: where the stream starts.
    Changes `policy`; -> the state at the end.
    """
    run, optimizer, queue = Path(config.out_dir), make_optimizer(policy, config), deque()
    run.mkdir(parents=True, exist_ok=True)
    step, at, bad, device = 0, begin, 0, next(policy.parameters()).device
    if state is not None:
        step, at = state["step"], state["stream"]
        load_optimizer(optimizer, state["optimizer"])
        if len(state["queue"]) == world_size():  # else the batches in flight are sampled again
            for saved in state["queue"][rank()]:
                queue.append(unpack(saved))
                ask(queue[-1], teachers, config, step + len(queue) - 1)
    resumed = queue[-1].batch.state if queue else at
    stream = open_stream(source, tokenizer, config, resumed)

    def save():
        nonlocal state
        if state is not None and state["step"] == step:
            return
        state = {
            "step": step,
            "stream": at,
            "optimizer": whole(optimizer.state_dict()),
            "queue": gather([pack(pool) for pool in queue]),
        }
        weights = whole_model(policy)
        if rank() == 0:
            os.fsync(log.fileno())
            checkpoint.save(run, step, weights, tokenizer, state, config.keep)

    def judged(sampler, clock):
        """The loop's first half: -> the oldest pool in flight, its rewards and the verdicts.

        Nothing in it waits for other processes, of which one may have failed.
        """
        # 1 and 2. Prefixes and their candidates; the questions about them go out.
        while len(queue) <= config.overlap and step + len(queue) < config.max_steps:
            teachers.check_stop()
            asked = time.time()
            batch = next(batches)
            clock["data"] += time.time() - asked
            pool = make_pool(sampler, batch, teachers, config, tokenizer)
            ask(pool, teachers, config, step + len(queue))
            queue.append(pool)
            for name, seconds in pool.seconds.items():
                clock[name] += seconds
        # 3. Rewards.
        asked = time.time()
        reward, scores = rewards_of(queue[0], teachers)
        clock["judge_wait"] += time.time() - asked
        return queue[0], reward, scores

    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(iter(stream)))
        log = stack.enter_context(open_log(run, step) if rank() == 0 else contextlib.nullcontext())
        monitors = stack.enter_context(Monitors(config, step, active=rank() == 0))
        watch = Collapse(run) if rank() == 0 else None
        bar = stack.enter_context(
            tqdm(
                total=config.max_steps,
                initial=step,
                desc=label,
                disable=None if rank() == 0 else True,
                mininterval=1,
            )
        )
        try:
            while step < config.max_steps:
                clock = {"step": time.time(), "data": 0.0, "rollout": 0.0, "judge_wait": 0.0}
                sampler = whole_model(policy, device)  # all processes take part: not in `agreed`
                pool, reward, scores = agreed(functools.partial(judged, sampler, clock))
                del sampler  # a copy, where the policy is spread
                # 4. The update.
                began = time.time()
                metrics, picked = update(policy, reference, optimizer, pool, reward, step, config)
                clock["update"] = time.time() - began
                queue.popleft()
                at = pool.batch.state
                line = describe(step, pool, reward, scores, picked, metrics, teachers, config)
                clock["step"] = time.time() - clock["step"]
                report(line, clock, log, watch, bar, label, config)
                monitors.numbers(line)
                if rank() == 0 and scores and step % config.example_every == 0:
                    monitors.text("examples", show_example(pool, reward, scores), step)
                bad = bad + 1 if line["not_finite"] else 0
                if bad:
                    keep_bad_batch(run, step, bad, pool, reward, picked)
                step += 1
                # After the log: a run killed in between does the step, and its line, again.
                if step % config.save_every == 0 and step < config.max_steps:
                    save()
        except (Interrupted, TeacherGone, UserError):
            save()
            raise
        save()
        return state


def keep_bad_batch(run: Path, step: int, bad: int, pool, reward, picked: dict):
    """Save what an update that was not finite learned from; stop at the BAD_STEPS-th in a row."""
    folder = run / "bad_batches"
    folder.mkdir(exist_ok=True)
    saved = {"step": step, "pool": pack(pool), "reward": reward, "picked": picked}
    torch.save(saved, folder / f"step_{step:06d}_process_{rank()}.pt")
    if bad == BAD_STEPS:
        raise UserError(
            f"{bad} updates in a row were not finite and were skipped, the last at step {step + 1}:"
            f" look at {folder}, or go on with --init_from=resume and a lower --learning_rate"
        )


def open_stream(source, tokenizer, config: Config, state) -> Stream:
    """The batches of this process: of documents, or of a teacher's prompts."""
    kind = Stream
    if config.task != "pretrain":
        how = dict(prompts=config.prompts, folder=config.init_from)
        how["supervised"] = "suffix" in config.candidates
        kind = functools.partial(TaskStream, **how)
    return kind(
        source,
        tokenizer,
        chunk=config.chunk,
        max_seq=config.max_seq,
        batch_size=config.batch_size,
        rank=rank(),
        world_size=world_size(),
        seed=config.seed,
        text_field=None if config.text_field == "auto" else config.text_field,
        window=config.window,
        state=state,
    )


def phases(config: Config) -> dict[str, Config]:
    """The run's phases by name: base (from scratch only), baseline (optional), and the method."""
    next_token = dict(objective="nll", candidates="suffix", rewards="", nll_prefix=True, overlap=0)
    next_token["temperature"] = 1.0  # that of the rollouts is the method's
    out = {}
    if config.task != "pretrain":
        return {"method": config}
    if config.init_from == "scratch" and config.base_steps:
        out["base"] = dataclasses.replace(
            config,
            **next_token,
            out_dir=f"{config.out_dir}/base",
            max_steps=config.base_steps,
            batch_size=config.base_batch_size,
            learning_rate=config.base_learning_rate,
            warmup_steps=config.base_steps // 30,
            save_every=250,
        )
    if config.baseline:
        out["baseline"] = dataclasses.replace(
            config, **next_token, out_dir=f"{config.out_dir}/baseline"
        )
    return out | {"method": config}


def initial_policy(config: Config, tokenizer, device) -> Llama:
    """The policy before the first step, float32 on the device: new weights by seed, or init_from's.

    UserError where they cannot be read, or hold fewer positions or tokens than the run needs.
    """
    if config.init_from == "scratch":
        shape = preset(config.model, tokenizer.vocab_size)
        shape.max_seq = max(shape.max_seq, config.max_seq)
        policy = Llama(shape).initialise(config.seed).to(device)
    else:
        policy = load_model(config.init_from, device, torch.float32)
    if policy.config.max_seq < config.max_seq:
        raise UserError(
            f"max_seq={config.max_seq} is more than the {policy.config.max_seq} positions that "
            f"{config.init_from} was made for (max_position_embeddings in its config.json)"
        )
    if policy.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"init_from={config.init_from} knows {policy.config.vocab_size} tokens, "
            f"tokenizer={config.tokenizer} has {tokenizer.vocab_size}: they do not belong together"
        )
    return policy


def open_inputs(config: Config):
    """The tokenizer. What the config names and is not there is an error before the run folder, in
    which another run may lie, is touched."""
    compiler = os.environ.get("CXX", "g++")
    if config.compile and not torch.cuda.is_available() and not shutil.which(compiler):
        raise UserError(f"compile=True needs a C++ compiler, there is no {compiler}: install one")
    try:
        load_prompts(config.prompts)
        if config.init_from == "scratch":
            preset(config.model, vocab_size=1)
        else:
            read_config(config.init_from)
            out_dir = Path(config.out_dir).resolve()
            if Path(config.init_from).resolve().is_relative_to(out_dir):
                raise UserError(f"{config.init_from} lies in out_dir: choose another out_dir")
        if config.data != "world":
            list_files(config.data)
        return open_tokenizer(config)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e


def open_tokenizer(config: Config):
    name = config.tokenizer
    if name == "auto":
        name = "world" if config.init_from == "scratch" else config.init_from
    return load_tokenizer(name)


def run_phases(config: Config, device, teachers: Teachers, tokenizer) -> dict:
    """Train every phase from the same base, then evaluate what each left. -> summary."""
    source, sets, questions = config.data, {}, None
    if config.task != "pretrain":
        source = Rows(config.data, config.task)
        if config.eval_prefixes:
            questions = held_out_stream(config, tokenizer)
    elif source == "world":
        source = WorldSource(config.seed, Dials(**parse_dials(config.dials)))
    # Read before training, so that nothing fails after it.
    if config.eval_prefixes and rank() == 0 and not questions:
        sets = held_out_sets(
            config.data,
            tokenizer,
            parse_dials(config.dials),
            chunk=config.chunk,
            max_seq=config.max_seq,
            count=config.eval_prefixes,
            text_field=None if config.text_field == "auto" else config.text_field,
        )
    spread = config.shard and world_size() > 1
    home = torch.device("cpu") if spread else device  # of weights in one piece
    policy, begin, policies = initial_policy(config, tokenizer, home), None, {}
    if "base" not in phases(config):
        policies["base"] = policy
    if rank() == 0:
        plan = [
            f"{name} ({c.objective}, {c.max_steps} steps)" for name, c in phases(config).items()
        ]
        print(f"training {', '.join(plan)} in {config.out_dir}, then the evaluation", flush=True)
    for label, phase in phases(config).items():
        trained, state = checkpoint.load(Path(phase.out_dir), home)
        trained, reference = copy.deepcopy(policy) if trained is None else trained, policy
        trained.recompute, trained.compiled = config.recompute, config.compile
        if spread:
            trained, reference = (shard(m, device) for m in (trained, copy.deepcopy(policy)))
        state = train(trained, reference, source, teachers, phase, tokenizer, state, begin, label)
        policies[label] = trained = whole_model(trained)
        if label == "base":
            policy, begin = trained, state["stream"]
    policies = {label: trained.to(device) for label, trained in policies.items()}
    if questions and rank() == 0:
        return evaluate_task(
            policies, questions, teachers.task, tokenizer, config.eval_prefixes, teachers.wait
        )
    if not sets:
        return {}
    with autocast(config, device):
        return evaluate(policies, sets, teachers.examiner, tokenizer, config.chunk)


def lock(run: Path):
    """Hold the run folder for this process, until the returned file is closed or it dies."""
    run.mkdir(parents=True, exist_ok=True)
    held = (run / ".lock").open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {run}") from None
    return held


def settle(config: Config, resume: bool):
    """The run folder, locked: go on with an unfinished run of the same settings, move any other
    aside."""
    run = Path(config.out_dir)
    held = lock(run)
    path = run / "config.json"
    if path.exists() and not resume:
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == dataclasses.asdict(config)
        except ValueError:
            raise UserError(
                f"{path} is damaged: restore or delete it, or choose --out_dir"
            ) from None
        if same and not (run / "summary.json").exists():
            print(f"going on with the unfinished run in {run}")
        else:
            number = 1
            while (aside := run.with_name(f"{run.name}.{number}")).exists():
                number += 1
            run.rename(aside)
            what = "the finished run of this command" if same else "another run"
            print(f"{run} held {what}, which is now {aside}")
            held.close()
            held = lock(run)
    configuration.write(config, path)
    write_text(run / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return held


def environment() -> dict:
    """What a reader needs to repeat the run."""
    here = Path(__file__).parent
    commit = ""
    if git := shutil.which("git"):
        command = [git, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def dry_run(config: Config) -> str:
    if config.init_from == "scratch":
        known = config.tokenizer != "auto" or config.data == "world"
        shape = preset(config.model, open_tokenizer(config).vocab_size if known else 32000)
    else:
        shape = read_config(config.init_from)
    return estimate(config, shape, bf16=config.dtype == "bfloat16" or torch.cuda.is_available())


def main(argv: list[str]):
    config, resume = configuration.parse(argv)
    if config.dry_run:
        try:
            print(dry_run(config))
        except (ValueError, OSError) as e:
            raise UserError(str(e)) from e
        return
    try:
        run(config, resume)
    except (OSError, sqlite3.Error) as e:  # a full disk, a folder that may not be written
        raise UserError(f"{config.out_dir}: {e} (what was saved before is untouched)") from e


def warn_of_foreign_texts(config: Config):
    """The pocket world's teacher knows only its own texts."""
    if config.data == "world" or config.task != "pretrain":
        return
    if config.judge_url == "world" and (config.rewards or config.eval_prefixes):
        print(f"warning: the pocket world's teacher judges; what it says of {config.data} means")
        print("         nothing: set judge_url")
    if config.rewrite_url == "world" and "rewrite" in names(config.candidates):
        print("warning: the pocket world's teacher rewrites, which it can do with its own texts")
        print("         alone: set rewrite_url, or leave rewrite out of the candidates")


def run(config: Config, resume: bool):
    device = start(config.device, config.give_up_after)
    tokenizer = open_inputs(config)
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            warn_of_foreign_texts(config)
            stack.enter_context(settle(config, resume))
        gather(None)  # nobody opens the folder before it is settled
        world_url = ""
        if "world" in (config.judge_url, config.rewrite_url, config.eval_judge_url):
            world_url = stack.enter_context(start_teacher(**parse_dials(config.dials)))
        try:
            teachers = Teachers(config, world_url)
        except ValueError as e:
            raise UserError(str(e)) from e
        stack.callback(teachers.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, teachers.stop))
        agreed(teachers.greet if rank() == 0 else lambda: None)
        summary = run_phases(config, device, teachers, tokenizer)
        if rank() == 0:
            folder = Path(config.out_dir)
            write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            if summary:
                print(f"\n{table(summary)}\n")
                if config.judge_url != "world" and not config.eval_judge_url:
                    print("warning: judged by the judge of the training; see --eval_judge_url")
                warn_of_foreign_texts(config)
            print(f"run folder {folder}, picture {plot_run(folder)}")


def launch() -> int:
    """main, with every foreseen end of a run as one line and an exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # no text of a corpus may end the run
    try:
        main(sys.argv[1:])
        return 0
    except (Interrupted, TeacherGone) as e:
        if rank() == 0:
            why = e if isinstance(e, TeacherGone) else "interrupted"
            print(f"{why}: the run is saved, the same command goes on with it", file=sys.stderr)
        return EXIT_TEACHER_GONE if isinstance(e, TeacherGone) else EXIT_INTERRUPTED
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(launch())
