"""Scores a finished run again, with other reward weights or schedules, from its recorded answers.

    python -m tools.replay runs/demo --rewards quality,safety:2 --comparisons all pivot 3 race

In: a run folder (config.json, judgments.sqlite and its like). Nothing is asked: a question that the
run did not ask counts as without an answer, and the share of those that were is in the table. Out:
for each schedule, how often the best and the worst are those of the run, and who would be chosen.
"""

import argparse
import contextlib
import heapq
import json
import zlib
from collections import Counter
from dataclasses import fields
from itertools import compress, groupby
from pathlib import Path

import numpy as np

from chat import Chat
from config import Config
from judge import open_judge
from support import command
from support.command import UserError
from support.files import markdown
from support.replies import Answer
from support.store import Reader


class Recorded(Chat):
    """A chat that knows the answers of a run and no others."""

    def __init__(self, run: Path, model: str):
        reader = Reader(run / "judgments.sqlite")
        super().__init__("http://nowhere.invalid/v1", model)
        self.store = reader  # type: ignore[assignment]

    async def _answer(self, key, body):
        return Answer(None, "not recorded", 0, 0)


def pools_by_step(reader: Reader):
    """(step, pools) in order; a pool is [key, prefix, reference, candidates, sources, rewards].

    Of a pool that was scored again by another number of processes, the later one.
    """
    query = "SELECT step, key, pool FROM pools ORDER BY step, key"
    rows = heapq.merge(*reader.rows(query), key=lambda row: row[:2])
    firsts = (next(same) for _, same in groupby(rows, key=lambda row: row[:2]))
    for step, group in groupby(firsts, key=lambda row: row[0]):
        yield step, [[key, *json.loads(zlib.decompress(blob))] for _, key, blob in group]


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


@contextlib.contextmanager
def recorded_judge(run, rewards=None, comparisons=None):
    """The judge of a run, finished or not, with its recorded answers."""
    path = Path(run) / "config.json"
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}: is this the folder of a run?") from None
    values |= {k: str(v) for k, v in dict(rewards=rewards, comparisons=comparisons).items() if v}
    known = {field.name for field in fields(Config)}  # an earlier version had other keys
    config = Config(**{name: value for name, value in values.items() if name in known})
    with Recorded(Path(run), config.judge_model) as chat:
        yield open_judge(chat, config)


def replay(run, rewards, comparisons):
    """One row of the table: a dict."""
    asked = absent = 0
    same_best, same_worst, chosen = [], [], Counter()
    with recorded_judge(run, rewards, comparisons) as judge:
        for step, pools in pools_by_step(judge.chat.store):
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
    return {
        "questions": asked,
        "answered": 1 - absent / max(asked, 1),
        "pools": len(same_best),
        "same best": np.mean(same_best) if same_best else np.nan,
        "same worst": np.mean(same_worst) if same_worst else np.nan,
        "chosen": {source: count / chosen.total() for source, count in chosen.items()},
    }


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("run", help="folder of a run")
    flag.add_argument("--rewards", help='for example "quality,safety:2"; the run\'s own')
    flag.add_argument("--comparisons", nargs="+", default=["all", "pivot", "race"])
    options = flag.parse_args(arguments)
    names = ["questions", "answered", "pools", "same best", "same worst", "chosen"]
    rows = [["comparisons", *names]]
    for comparisons in options.comparisons:
        row = replay(options.run, options.rewards, comparisons)
        chosen = ", ".join(f"{source} {share:.0%}" for source, share in row["chosen"].items())
        shares = [f"{row[name]:.1%}" for name in ("answered", "same best", "same worst")]
        rows.append([comparisons, row["questions"], shares[0], row["pools"], *shares[1:], chosen])
    print(markdown(rows))


if __name__ == "__main__":
    command.run(main)
