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
from itertools import groupby
from pathlib import Path

import numpy as np

from config import GONE, WAS, Config, check
from judge import Judge
from support import command
from support.chat import Chat
from support.command import UserError
from support.endpoint import Answer
from support.files import markdown
from support.settings import nested, read_saved
from support.store import Reader


class Recorded(Chat):
    """A chat that knows the answers of a run and no others."""

    def __init__(self, run: Path, config: Config):
        recorded = Reader(run / "judgments.sqlite")
        extra = nested(config.judge_extra)
        super().__init__("http://nowhere.invalid/v1", config.judge_model, extra=extra)
        self.store = recorded  # type: ignore[assignment]

    async def _answer(self, *question, **how):
        return Answer(None, "not recorded", 0, 0)


def recorded_pools(reader: Reader):
    """(step, key, prefix, reference, candidates, sources, rewards) in the order of steps and keys.

    Of a pool that was scored again by another number of processes, the later one.
    """
    query = "SELECT step, key, pool FROM pools ORDER BY step, key"
    rows = heapq.merge(*reader.rows(query), key=lambda row: row[:2])
    for _, same in groupby(rows, key=lambda row: row[:2]):
        step, key, pool = next(same)
        yield step, key, *json.loads(zlib.decompress(pool))


@contextlib.contextmanager
def recorded_judge(run, **other):
    """The judge of a run, finished or not, with its recorded answers; other: keys to change."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file: is this the folder of a run?")
    changed = {name: value for name, value in other.items() if value}
    config = check(Config(**read_saved(Config, GONE, WAS, path) | changed))
    with Recorded(Path(run), config) as chat:
        yield Judge(chat, config)


def best(reward):
    """Probability that each candidate of a pool is the best, [C]: ties are broken by chance."""
    first = reward == np.nanmax(reward)
    return first / first.sum()


def replay(run, rewards, comparisons):
    """(questions asked, share of them answered, for each pool whether best and worst are the run's,
    source -> how often it is chosen)."""
    asked, absent, same, chosen = 0, 0, [], Counter()
    with recorded_judge(run, rewards=rewards, comparisons=comparisons) as judge:
        for step, key, *texts, sources, reward in recorded_pools(judge.chat.store):
            scores = judge.score(step, *([text] for text in texts), sources, [key]).result()
            asked += scores.calls - scores.failed + scores.absent
            absent += scores.absent
            # rounded as in update.py, where sums that differ by rounding alone are a tie
            old, new = np.stack([np.array(reward, dtype=float), scores.reward[0]]).round(9)
            if np.isfinite(old).any() and np.isfinite(new).any():
                same.append([best(end * new)[np.nanargmax(end * old)] for end in (1, -1)])
                if np.nanmin(new) < np.nanmax(new):  # else training chooses nobody
                    for source, share in zip(sources, best(new), strict=True):
                        chosen[source] += share
    return asked, 1 - absent / max(asked, 1), same, chosen


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("run", help="folder of a run")
    flag.add_argument("--rewards", help='for example "quality,safety:2"; the run\'s own')
    flag.add_argument("--comparisons", nargs="+", default=["all", "pivot", "race"])
    options = flag.parse_args(arguments)
    rows = [["comparisons", "questions", "answered", "pools", "same best", "same worst", "chosen"]]
    for comparisons in options.comparisons:
        asked, answered, same, chosen = replay(options.run, options.rewards, comparisons)
        ends = np.mean(same, 0) if same else [np.nan, np.nan]
        names = ", ".join(f"{name} {n / chosen.total():.0%}" for name, n in chosen.items())
        shown = [f"{share:.1%}" for share in (answered, *ends)]
        rows.append([comparisons, str(asked), shown[0], str(len(same)), *shown[1:], names])
    print(markdown(rows))


if __name__ == "__main__":
    command.run(main)
