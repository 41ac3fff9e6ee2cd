"""A run as one HTML page that needs no network.

    python -m tools.report RUN [--pools=200]

In: a run folder's log.jsonl, config.json, summary.json and judgments, finished or not; the page's
frame, report.html. Out: RUN/report.html: curves, then pools spread evenly over the run, with
candidates side by side, their sources and rewards, and what the judge said about each; filtered by
step, source and who won.

Candidates and verdicts are text of models, which may hold anything: they reach the page as JSON in
which no tag can start, the page's script shows them as text only, and its policy lets no other run.
"""

import argparse
import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path

import numpy as np

from config import Config
from evaluation.results import table
from support import command
from support.store import files_of
from tools.plot import plot_run, read_json, read_log, read_summary
from tools.replay import recorded_judge, recorded_pools

VERDICT_CHARACTERS = 600  # kept of an answer, from its end, where the verdict stands


def pool_of(pool: tuple, judge) -> dict:
    """A recorded pool with the recorded answers about each of its candidates, the best first."""
    step, key, prefix, reference, texts, sources, rewards = pool
    scores = judge.score(step, [prefix], [reference], [texts], sources, [key]).result()
    # rounded as in update.py: sums that differ by rounding alone are a tie
    rewards = np.array(rewards, dtype=float).round(9)  # [C], nan where absent
    known = set(rewards[np.isfinite(rewards)])
    ends = (max(known), min(known)) if len(known) > 1 else (None, None)
    candidates = []
    for text, source, reward in zip(texts, sources, rewards, strict=True):
        seen = [verdict_of(v, text) for v in scores.examples if text in v["candidates"]]
        about = {"source": source, "text": text, "verdicts": seen}
        about["reward"] = float(reward) if reward in known else None
        about["best"], about["worst"] = (bool(reward == end) for end in ends)
        candidates.append(about)
    candidates.sort(key=lambda c: (c["reward"] is None, -(c["reward"] or 0)))
    return {"step": step + 1, "key": key, "prefix": prefix, "candidates": candidates}


def verdict_of(seen: dict, text: str) -> dict:
    """One verdict as the page shows it, from the point of view of a candidate with this text."""
    told = {name: seen[name] for name in ("kind", "verdict", "answer")} | {"against": None}
    if len(seen["candidates"]) == 2:
        place = seen["candidates"].index(text)
        told["against"] = f"it was {'AB'[place]}, against: {seen['candidates'][1 - place]}"
    if len(told["answer"] or "") > VERDICT_CHARACTERS:
        told["answer"] = "[...] " + told["answer"][-VERDICT_CHARACTERS:]
    return told


def pools_of(run: Path, count: int) -> list[dict]:
    """So many of the pools that the run's processes have kept, in the order of steps: evenly, the
    first and the last among them."""
    if not any(files_of(run / "judgments.sqlite")):
        return []
    with recorded_judge(run) as judge:
        store = judge.chat.store
        keys = sorted({row for rows in store.rows("SELECT step, key FROM pools") for row in rows})
        places = np.linspace(0, len(keys) - 1, min(max(count, 0), len(keys))).round().astype(int)
        wanted = {keys[place] for place in places}
        return [pool_of(pool, judge) for pool in recorded_pools(store) if pool[:2] in wanted]


def page(run: Path, pools: list[dict]) -> str:
    steps, config = len(read_log(run)), vars(Config()) | read_json(run / "config.json")
    about = (
        f"{steps:,} of {config['max_steps']:,} steps, policy from {config['init_from']}, "
        f"data {config['data']}, judge {config['judge_model']} at {config['judge_url']}"
    )
    summary = read_summary(run)
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.findall("<script>(.*?)</script>", frame, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(pools)
    for sign in "<>&":  # no tag or comment can start inside the element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    parts = {
        "digest": digest,
        "title": escape(f"{run.resolve().name}: {config['objective']}, {config['candidates']}"),
        "about": escape(about),
        "picture": base64.b64encode(plot_run(run).read_bytes()).decode(),
        "evaluation": escape(table(summary)) if "policies" in summary else "",
        "settings": escape("\n".join(f"{key:<24}{value}" for key, value in config.items())),
        "data": data,
    }
    return re.sub(r"\{(\w+)\}", lambda m: parts[m[1]], frame)


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("run", type=Path, help="folder of a run")
    flag.add_argument("--pools", type=int, default=200, help="shown at most, evenly spread")
    options = flag.parse_args(arguments)
    path = options.run / "report.html"
    path.write_text(page(options.run, pools_of(options.run, options.pools)), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    command.run(main)
