"""What a run tells: a line of log.jsonl and of the screen a step, and example candidates.

In: a step's pool, rewards and metrics. Out: log.jsonl; names with dots group what belongs together.
"""

import contextlib
import json
import math
from collections import Counter, deque
from pathlib import Path

import torch
from tqdm import tqdm

from candidates import Pool
from config import Config, names
from support.distributed import all_sum
from support.files import write_text
from update import learning_rate


def describe(step, pool, reward, scores, picked, metrics, teachers, config: Config) -> dict:
    """The step's line of log.jsonl, over all processes."""

    def mean(values):
        values = values[~values.isnan()]
        return float(values.sum()), values.numel()

    means = dict(metrics)
    means["skipped"] = (len(reward) - len(picked["rows"]), 0)
    kinds = sorted({s.removesuffix("s") for s in names(config.candidates)})
    is_source = {kind: torch.tensor([s == kind for s in pool.sources]) for kind in kinds}
    for kind, mask in is_source.items():
        means[f"chosen.{kind}"] = (int(mask[picked["chosen"]].sum()), len(picked["rows"]))
    if scores is not None:
        means["reward"] = mean(reward)
        for name, values in scores.by_kind.items():
            means[f"reward.{name}"] = mean(torch.from_numpy(values))
        for kind, mask in is_source.items():
            means[f"reward.{kind}"] = mean(reward[:, mask])
        for name in ("calls", "failed", "absent"):
            means[f"judge.{name}"] = (getattr(scores, name), 0)
        means |= teachers.traffic()
    if "rewrite" in is_source:
        means["rewrite.failed"] = (sum(text is None for row in pool.texts for text in row), 0)
    if "rollout" in is_source:
        means |= of_rollouts(pool, is_source["rollout"])
    line = {"step": step, "lr": learning_rate(step, config)}
    for name, (total, count) in all_sum(means).items():
        empty = math.nan if name.startswith("reward") else total  # no verdict is no score
        line[name] = total / count if count else empty
    return line


def of_rollouts(pool: Pool, mask) -> dict:
    """Their tokens, length, surprise (nats a token) and repetition; mask bool [C]."""
    tokens, lengths = pool.tokens[:, mask].flatten(0, 1), pool.lengths[:, mask].flatten()
    total, count = int(lengths.sum()), len(lengths)
    rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return {
        "rollout.tokens": (total, 0),
        "rollout.length": (total, count),
        "rollout.nll": (-float(pool.old.sum()), total),
        "rollout.repeated": (sum(repeated_share(row[:n]) for row, n in rows), count),
    }


def repeated_share(ids: list) -> float:
    """Share of a rollout's 3-grams that it has already used: 1 when it says one thing for ever."""
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


WINDOW = 10  # steps that are averaged, at the start of the run and now
SHRUNK = {"rollout.nll": 0.2, "rollout.length": 0.25}  # collapsed below this share of the start
REPEATED = 0.5  # collapsed above this share of repeated 3-grams, and three times the start's


class Collapse:
    """Watches a run for rollouts that lose their entropy, their length or their variety, measured
    against its own first steps. In: the lines of the log. Out: words for the step line."""

    def __init__(self, run: Path):
        self.first, self.recent = [], deque(maxlen=WINDOW)
        for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
            self.see(json.loads(line))

    def see(self, line: dict) -> list[str]:
        if line.get("rollout.nll") is None:
            return []
        values = {name: line[name] for name in (*SHRUNK, "rollout.repeated")}
        self.recent.append(values)
        if len(self.first) < WINDOW:
            self.first.append(values)
            return []
        before, now = (
            {name: sum(each[name] for each in steps) / WINDOW for name in values}
            for steps in (self.first, self.recent)
        )
        limits = {name: now[name] < share * before[name] for name, share in SHRUNK.items()}
        name = "rollout.repeated"
        limits[name] = now[name] > max(REPEATED, 3 * before[name])
        return [
            f"COLLAPSE: {name} {now[name]:.2f}, {before[name]:.2f} at the start"
            for name, passed in limits.items()
            if passed
        ]


def report(line: dict, clock: dict, log, watch, bar, label: str, config: Config):
    """Write the line to log.jsonl and show it; clock: seconds of the step and of its parts."""
    parts = sum(clock[name] for name in ("data", "rollout", "judge_wait", "update"))
    clock["other"] = clock["step"] - parts
    line |= {f"seconds.{name}": round(value, 4) for name, value in clock.items()}
    if "rollout.tokens" in line:
        speed = line["rollout.tokens"] / clock["rollout"] if clock["rollout"] else 0.0
        line["rollout.tokens_per_second"] = round(speed)
    bar.update(1)
    bar.set_postfix_str(numbers_that_matter(line))
    if log is None:
        return
    numbers = {name: value if math.isfinite(value) else None for name, value in line.items()}
    log.write(json.dumps(numbers) + "\n")
    log.flush()
    notes = watch.see(line)
    if line["not_finite"]:
        notes.append("NOT FINITE: update skipped")
    done = line["step"] + 1
    if not config.rewards and (done % 100 == 0 or done == config.max_steps):
        bar.write(f"{label} step {done:4d} of {config.max_steps}  loss {line['loss']:.3f}")
    if config.rewards:
        shares = [
            f"{k[len('chosen.') :]} {v:.2f}" for k, v in line.items() if k.startswith("chosen.")
        ]
        bar.write(
            f"step {done:4d}  loss {line['loss']:.3f}  reward {line['reward']:.3f}  "
            f"chosen: {', '.join(shares)}  skipped {line['skipped']:.0f}  "
            f"judge {line['judge.calls']:.0f} ({line['judge.failed']:.0f} failed)  "
            f"{clock['step']:.2f} s" + "".join(f"  {note}" for note in notes)
        )
    elif notes:
        bar.write(f"{label} step {done:4d}  {'  '.join(notes)}")


def numbers_that_matter(line: dict) -> str:
    """For the progress bar: loss, reward, who is chosen, failures of the judge, speed."""
    out = [f"loss {line['loss']:.3f}"]
    if "reward" in line:
        won = {k.partition(".")[2]: v for k, v in line.items() if k.startswith("chosen.")}
        out += [f"reward {line['reward']:.2f}", *(f"{k} {v:.0%}" for k, v in won.items())]
        out.append(f"judge failed {line['judge.failed'] / max(1, line['judge.calls']):.0%}")
    if "rollout.tokens_per_second" in line:
        out.append(f"{line['rollout.tokens_per_second']:,} tokens/s")
    return ", ".join(out)


def show_example(pool: Pool, reward, scores) -> str:
    """Print one prefix, its candidates with their rewards, and a verdict of each kind: look at the
    text. -> what was printed."""
    out = [f"    prefix   {pool.batch.prefix_text[0][-300:]!r}"]
    for source, text, value in zip(pool.sources, pool.texts[0], reward[0].tolist(), strict=True):
        out.append(f"    {source:8} {value:5.2f}  {text!r}")
    count: Counter = Counter()
    names: dict[str, str] = {}
    for source, text in zip(pool.sources, pool.texts[0], strict=True):
        count[source] += 1
        names.setdefault(text, f"{source} {count[source]}")
    seen: dict = {}
    for verdict in scores.examples:
        seen.setdefault(verdict["kind"], verdict)
    for verdict in seen.values():
        shown = " against ".join(names.get(text, "?") for text in verdict["candidates"])
        found = f"{verdict['verdict']}: {verdict['answer']!r}"
        out.append(f"    {verdict['kind']} of {shown}: {found}")
    tqdm.write("\n".join(out))
    return "\n".join(out)


def open_log(run: Path, step: int):
    """log.jsonl, without the lines of steps that a resumed run does again."""
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut off
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")
