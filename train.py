"""Self-improving pretraining (arXiv 2601.21343): one prefix, many continuations, a reward for each.

    python train.py                                  the pocket world on a laptop, minutes
    torchrun --nproc_per_node=8 train.py configs/paper.py configs/table1.py:quality \\
        --data='slimpajama/*.jsonl.zst' --init_from=MODEL \\
        --judge_url=http://HOST:8000/v1 --judge_model=NAME    a row of the paper, 8 GPUs

In: documents, an initial policy, teachers behind HTTP. Out: a run folder with config.json,
log.jsonl (an object a step), checkpoints and `ckpt` (a Hugging Face folder), judgments.sqlite,
summary.json and training.png. Keys: `python train.py --help`, explained in config.py.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import sqlite3
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import config as configuration
from config import Config, differences, monitors, phases
from support import command
from support.command import UserError, check, wait


def before_torch(arguments: list[str]):
    """--help and mistakes are answered before torch is imported, which takes seconds."""
    configuration.parse(arguments)
    if not importlib.util.find_spec("torch"):
        raise UserError("this Python has no PyTorch: source .venv/bin/activate")


if __name__ == "__main__" and (code := command.exit_code(before_torch)):
    sys.exit(code)

import torch
import torch.distributed as dist

from candidates import autocast, example, make_pool, pack, unpack
from data import open_stream
from judge import first_wins, load_prompts
from model import in_one_piece, initial_policy, load_model, preset, read_config, save_model
from optimizer import make_optimizer
from rewrite import Teachers
from support import checkpoint, distributed, store
from support.distributed import agreement, gather, load_optimizer, rank, whole, world_size
from support.files import write_text
from support.runlog import Clock, RunLog, settle
from support.tokenizer import load_tokenizer
from update import describe, keep_bad_batch, pick, update


def train(policy, reference, stream, score, rewriter, tokenizer, config, traffic=dict, state=None):
    """The loop of self-improving pretraining, in the paper's order (section 2); changes `policy`.

    reference: the frozen initial policy; stream: a data.Stream, standing where the run begins;
    score(step, pool) -> Future of judge.Scores; rewriter: a rewrite.Rewriter, or None without
    rewrites; traffic() -> what teachers were asked since its last call, for the log; state: of the
    newest checkpoint, or None. -> the stream's state at the end.
    """
    run = Progress(policy, stream, tokenizer, config, state)
    pools, device = run.pools, next(policy.parameters()).device
    for n, pool in enumerate(pools):  # of an overlapped run that goes on
        pool.scores = score(run.step + n, pool)
    with run.log() as log, run.saved(log), contextlib.closing(iter(stream)) as batches:
        while run.step < config.max_steps:
            clock = Clock()
            sampler = in_one_piece(policy, device) if "rollouts" in config.candidates else None
            with agreement():  # what fails on one process ends all of them
                check()
                # 1, 2. Prefixes [B, P], their candidates [B, C, N]; questions about them go out.
                while len(pools) <= config.overlap and run.step + len(pools) < config.max_steps:
                    with clock("data"):
                        batch = next(batches)
                    pool = make_pool(sampler, batch, rewriter, config, tokenizer, clock)
                    pool.scores = score(run.step + len(pools), pool)
                    pools.append(pool)
                # 3. Rewards [B, C] of the oldest pool in flight, nan where there is no verdict.
                with clock("judge_wait"):
                    optimizer = run.optimizer  # torch's first takes seconds: the judge is at work
                    scores = wait(pools[0].scores)
            del sampler  # a copy, where the policy is spread over processes
            # 4. What the objective picks (DPO: the best, the worst rollout) moves the policy.
            with clock("update"):
                pool, reward = pools[0], torch.from_numpy(scores.reward)
                picked = pick(pool, reward, config)
                metrics = update(
                    policy, reference, optimizer, pool, picked, reward, run.step, config
                )
            step = run.next_step(metrics["not_finite"][0])  # the number of this one, now done
            # 5. A line of the log, now and then the texts themselves, now and then a checkpoint.
            line = describe(step, pool, scores, picked, metrics | traffic(), config)
            log.step(line, clock)
            if config.rewards and step % config.example_every == 0 and pool.texts:
                log.text("examples", example(pool, scores), step)
            if run.bad:  # updates in a row that were not finite
                with agreement():
                    keep_bad_batch(run.folder, step, run.bad, pack(pool), reward, picked)
            if run.step % config.save_every == 0 and run.step < config.max_steps:
                run.save(log)
    return run.at


class Progress:
    """Where a phase stands: its step, its stream's state `at` and the pools in flight."""

    def __init__(self, policy, stream, tokenizer, config: Config, state: dict | None):
        self.policy, self.tokenizer, self.config = policy, tokenizer, config
        self.folder, self.state = Path(config.out_dir), state
        self.step, self.at, self.bad = 0, stream.state, 0
        self.pools: deque = deque()
        if state is not None:
            self.step, self.at = state["step"], state["stream"]
            if len(state["queue"]) == world_size():  # else pools in flight are sampled again
                self.pools.extend(map(unpack, state["queue"][rank()]))
        self.last_save = self.step
        stream.state = self.pools[-1].batch.state if self.pools else self.at

    @functools.cached_property
    def optimizer(self):
        made, state, self.state = make_optimizer(self.policy, self.config), self.state, None
        return load_optimizer(made, state["optimizer"]) if state else made  # its moments, once

    def log(self) -> RunLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        label = self.folder.name if self.folder.name in ("base", "baseline") else "method"
        steps, track = self.config.max_steps, monitors(self.config)
        return RunLog(self.folder, label, self.step, steps, track, active=rank() == 0)

    @contextlib.contextmanager
    def saved(self, log: RunLog):
        """Whatever ends what is done within, its finished steps are saved first."""
        try:
            yield
        except Exception as e:
            if world_size() == 1 or getattr(e, "agreed", False):  # else the others do not come
                self.save(log)
            raise
        self.save(log)

    def save(self, log: RunLog):
        if self.step == self.last_save:
            return
        first = rank() == 0
        state = {
            "step": self.step,
            "stream": self.at,
            "optimizer": whole(self.optimizer.state_dict(), keep=first),
            "queue": gather([pack(pool) for pool in self.pools]),
        }
        policy = in_one_piece(self.policy, keep=first)
        if first:
            log.sync()  # a run killed in between does the step, and its line, again
            write = functools.partial(write_folder, policy, self.tokenizer)
            checkpoint.save(self.folder, self.step, write, state, self.config.keep)
        self.last_save = self.step

    def next_step(self, not_finite: float) -> int:
        """The update with the oldest pool is made: -> the number of that step."""
        self.at, self.step = self.pools.popleft().batch.state, self.step + 1
        self.bad = self.bad + 1 if not_finite else 0
        return self.step - 1


def write_folder(policy, tokenizer, folder: Path):
    save_model(policy, folder, tokenizer.bos, tokenizer.eos)
    tokenizer.save(folder)


# ---- Around the loop ----------------------------------------------------------------------------


def open_inputs(config: Config):
    """The tokenizer. What config names and is not there is an error before out_dir is touched."""
    load_prompts(config.prompts)
    if config.init_from == "scratch":
        preset(config.model, vocab_size=1)
    else:
        read_config(config.init_from)
        inside = Path(config.init_from).resolve().is_relative_to(Path(config.out_dir).resolve())
        if inside and not config.init_from.startswith("hf://"):
            raise UserError(f"{config.init_from} lies in out_dir: choose another out_dir")
    if config.data != "world":
        from support.sources import list_files

        list_files(config.data)
    own = "world" if config.init_from == "scratch" else config.init_from
    return load_tokenizer(own if config.tokenizer == "auto" else config.tokenizer)


@contextlib.contextmanager
def opened(config: Config, resume: bool):
    """Join the other processes, read the inputs, hold the run folder, listen to signals.
    -> (device, tokenizer)"""
    device, run = distributed.start(config.device, config.give_up_after), Path(config.out_dir)
    settings, other = dataclasses.asdict(config), functools.partial(differences, config)
    try:
        tokenizer = open_inputs(config)
        with contextlib.ExitStack() as stack:
            if rank() == 0:
                stack.enter_context(settle(run, settings, other, resume))
                store.settle(run / "judgments.sqlite", world_size())
            gather(None)  # nobody opens the folder before it is settled
            stack.enter_context(command.listening())
            yield device, tokenizer
    except BrokenPipeError:  # `... | head`
        raise
    except (OSError, sqlite3.Error) as e:  # a full disk, a folder that may not be written
        raise UserError(f"{run}: {e} (what was saved before is untouched)") from e
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train_phases(config: Config, device, tokenizer, batches: Callable, teachers) -> dict:
    """Train every phase from the same base. batches(phase's config) -> its stream.
    -> {phase: policy}, the untrained one under "base" where there is no such phase"""
    spread = config.shard and world_size() > 1
    home = torch.device("cpu") if spread else device  # of weights in one piece
    policy, begin, plan = initial_policy(config, tokenizer.vocab_size, home), None, phases(config)
    policies = {} if "base" in plan else {"base": policy}
    threads = distributed.choose_threads(policy.config.d_model)
    if rank() == 0:
        told = [f"{name} ({c.objective}, {c.max_steps} steps)" for name, c in plan.items()]
        where = f"{config.out_dir} ({device}, threads: {threads})"
        print(f"training {', '.join(told)} in {where}", flush=True)
    for label, phase in plan.items():
        trained, state = checkpoint.load(Path(phase.out_dir), lambda ckpt: load_model(ckpt, home))
        trained, reference = (copy.deepcopy(policy) if trained is None else trained), policy
        trained.recompute, trained.compiled = config.recompute, config.compile
        if spread:
            pair = trained, copy.deepcopy(policy)
            trained, reference = (distributed.shard(model, device) for model in pair)
        stream, judged = batches(phase), bool(phase.rewards)
        stream.state = begin
        score, traffic = (teachers.score, teachers.traffic) if judged else (first_wins, dict)
        teach = score, teachers.rewriter
        at = train(trained, reference, stream, *teach, tokenizer, phase, traffic, state)
        policies[label] = trained = in_one_piece(trained)
        if label == "base":
            policy, begin = trained, at
    return {label: trained.to(device) for label, trained in policies.items()}


def main(arguments: list[str]):
    """A run: its teachers, its phases, the closing evaluation. Here alone the root names rooms."""
    from evaluation.evaluate import evaluate
    from evaluation.results import table
    from evaluation.sets import held_out_sets
    from tools.check import try_out
    from tools.cost import dry_run
    from tools.plot import plot_run
    from world.corpus import parse_dials, source_of
    from world.teacher import teacher_at, warn_of_foreign_texts

    config, resume = configuration.parse(arguments)
    dials, sets, summary = parse_dials(config.dials), {}, {}
    if config.dry_run:
        return print(dry_run(config))
    if config.check:
        return try_out(config, open_inputs)
    with contextlib.ExitStack() as stack:
        device, tokenizer = stack.enter_context(opened(config, resume))
        if rank() == 0:
            warn_of_foreign_texts(config)
        with agreement():
            if config.eval_prefixes and rank() == 0:  # so early that nothing fails after training
                field = None if config.text_field == "auto" else config.text_field
                size = dict(chunk=config.chunk, max_seq=config.max_seq, count=config.eval_prefixes)
                sets = held_out_sets(config.data, tokenizer, dials, **size, text_field=field)
        teachers = Teachers(config, teacher_at("world", dials), stack)
        batches = functools.partial(open_stream, source_of(config), tokenizer)
        policies = train_phases(config, device, tokenizer, batches, teachers)
        if rank() > 0:
            return None
        if sets:
            with autocast(config, device):
                summary = evaluate(policies, sets, teachers.examiner, tokenizer, config.chunk)
            print(f"\n{table(summary)}\n")
            if config.judge_url != "world" and teachers.examiner is teachers.judge:
                print("warning: judged by the judge of the training; see --eval_judge_url")
            warn_of_foreign_texts(config)
        finish(config, summary, plot_run)


def finish(config: Config, summary: dict, plot_run: Callable[[Path], Path]):
    """summary.json, with which a run counts as finished, and its picture."""
    run = Path(config.out_dir)
    write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"run folder {run}, picture {plot_run(run)}")


if __name__ == "__main__":
    command.run(main)
