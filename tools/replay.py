"""Scores a finished run again, with other reward weights or schedules, from its recorded answers.

    python judge.py replay runs/demo --rewards quality,safety:2 --comparisons all pivot 3 race

In: a run folder (config.json, judgments.sqlite). Nothing is asked: a question that the run did not
ask counts as without an answer, and the share of those that were is in the table. Out: for each
schedule, how often the best and the worst are those of the run, and who would have been chosen."""

import argparse
import json
import sqlite3
import zlib
from collections import Counter
from itertools import compress, groupby
from pathlib import Path

import numpy as np

from chat import Answer, Chat
from judge import Judge
from support import command


class Recorded(Chat):
    """A chat that knows the answers in its cache and no others."""

    async def _answer(self, key, body):
        return Answer(None, "not recorded", 0, 0)


def pools_by_step(store):
    """(step, pools) in order; a pool is [key, prefix, reference, candidates, sources, rewards]."""
    db = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    rows = db.execute("SELECT step, key, pool FROM pools ORDER BY step, key")
    for step, group in groupby(rows, key=lambda row: row[0]):
        yield step, [[key, *json.loads(zlib.decompress(blob))] for _, key, blob in group]
    db.close()


def same_end(recorded, replayed):
    """Probability that the best of `replayed`, ties broken by chance, is that of `recorded`."""
    best = replayed == np.nanmax(replayed)
    return best[np.nanargmax(recorded)] / best.sum()


def chosen_of(sources, reward):
    """Source -> probability that training would choose it: ties are broken by chance, and where all
    rewards are equal nobody is chosen."""
    best = reward == np.nanmax(reward)
    shares = Counter()
    if np.nanmin(reward) < np.nanmax(reward):
        for source in compress(sources, best):
            shares[source] += 1 / best.sum()
    return shares


def recorded_judge(run, rewards=None, comparisons=None):
    """The judge of a finished run, with its recorded answers; close its `chat` after use."""
    config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    cache = Path(run) / "judgments.sqlite"
    how = {"comparisons": comparisons, "rewards": rewards}
    config |= {name: value for name, value in how.items() if value}
    try:
        comparisons = str(config["comparisons"])
        return Judge(
            Recorded("http://nowhere.invalid/v1", config["judge_model"], cache=cache),
            rewards=config["rewards"],
            comparisons=int(comparisons) if comparisons.isdigit() else comparisons,
            samples=config["judge_samples"],
            temperature=config["judge_temperature"],
            top_p=config["judge_top_p"],
            max_tokens=config["judge_max_tokens"],
            prompts=config["prompts"],
            retries=config["judge_retries"],
            seed=config["seed"],
        )
    except KeyError as error:
        raise ValueError(f"{run}/config.json lacks {error}") from None


def replay(run, rewards, comparisons):
    """One row of the table: a dict."""
    judge = recorded_judge(run, rewards, comparisons)
    asked = absent = 0
    same_best, same_worst, chosen = [], [], Counter()
    for step, pools in pools_by_step(Path(run) / "judgments.sqlite"):
        keys, prefixes, references, candidates, sources, before = map(
            list, zip(*pools, strict=True)
        )
        scores = judge.score(step, prefixes, references, candidates, sources[0], keys).result()
        asked += scores.calls - scores.failed + scores.absent
        absent += scores.absent
        # rounded as in update.py, where sums that differ by rounding alone are a tie
        pairs = np.stack([np.array(before, dtype=float), scores.reward]).round(9)
        for old, new in zip(*pairs, strict=True):
            if np.isfinite(old).any() and np.isfinite(new).any():
                same_best.append(same_end(old, new))
                same_worst.append(same_end(-old, -new))
                chosen.update(chosen_of(sources[0], new))
    judge.chat.close()
    return {
        "questions": asked,
        "answered": 1 - absent / max(asked, 1),
        "pools": len(same_best),
        "same best": np.mean(same_best) if same_best else np.nan,
        "same worst": np.mean(same_worst) if same_worst else np.nan,
        "chosen": {source: count / chosen.total() for source, count in chosen.items()},
    }


def report(run, rewards, schedules):
    rows = [replay(run, rewards, comparisons) for comparisons in schedules]
    print("| comparisons | questions | answered | pools | same best | same worst | chosen |")
    print("| --- " * 7 + "|")
    for comparisons, row in zip(schedules, rows, strict=True):
        chosen = ", ".join(f"{source} {share:.0%}" for source, share in row["chosen"].items())
        print(
            f"| {comparisons} | {row['questions']} | {row['answered']:.1%} | {row['pools']} "
            f"| {row['same best']:.1%} | {row['same worst']:.1%} | {chosen} |"
        )


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("run", help="folder of a run")
    flag.add_argument("--rewards", help='for example "quality,safety:2"; the run\'s own')
    flag.add_argument("--comparisons", nargs="+", default=["all", "pivot", "race"])
    options = flag.parse_args(arguments)
    report(options.run, options.rewards, options.comparisons)


if __name__ == "__main__":
    command.run(main)
