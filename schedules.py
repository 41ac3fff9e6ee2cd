"""Which pairs of candidates a pairwise judge is asked about, and what score each candidate gets.

In: the number n of candidates. `schedule` is a generator: it yields rounds of (first, second)
pairs, is sent the outcomes (1 first wins, 0 second wins, between with repeated samples, nan
absent), and returns the scores [n]. Nothing here knows a judge, so schedules can be simulated."""

import numpy as np


def schedule(comparisons, n, pivot, rng):
    """comparisons: "all", "pivot" or an int R (every candidate meets R others, at random)."""
    if n < 2:
        return np.full(n, 0.5)  # alone, a tie with itself
    circle = rng.permutation(n)  # who is shown first follows from the seats, see `oriented`
    if comparisons == "all":
        pairs = circulant(circle, n - 1, rng)
    elif comparisons == "pivot":
        pairs = [oriented(circle, pivot, other) for other in range(n) if other != pivot]
    else:
        pairs = circulant(circle, min(int(comparisons), n - 1), rng)
    outcomes = yield pairs
    return win_rates(n, pairs, outcomes)


def oriented(circle, i, j):
    """The order in which i and j are shown: whoever has the other within half a turn clockwise
    comes first. A candidate that meets everybody is then first in exactly half of its
    comparisons (n odd) or in one half rounded up or down (n even), whatever its source."""
    n, seat = len(circle), np.argsort(circle)
    ahead = (seat[j] - seat[i]) % n
    if 2 * ahead == n:  # opposite seats: take turns
        return (i, j) if (min(seat[i], seat[j]) + (seat[i] > seat[j])) % 2 == 0 else (j, i)
    return (i, j) if 2 * ahead < n else (j, i)


def circulant(circle, degree, rng):
    """A random regular graph: everybody meets those d seats away, for a few random d. Every pair
    is equally likely, so the mean over it is an unbiased estimate of the all-pairs win rate.
    With n and degree both odd no such graph exists; one candidate then meets one more."""
    n = len(circle)
    if degree >= n - 1:
        return [oriented(circle, i, j) for i in range(n) for j in range(i)]
    links = set()
    if degree % 2:  # a matching along the rim; wraps onto seat 0 when n is odd
        links |= {frozenset((s, (s + 1) % n)) for s in range(0, n, 2)}
    distances = np.arange(1 + degree % 2, (n - 1) // 2 + 1)
    for d in rng.permutation(distances)[: degree // 2]:
        links |= {frozenset((s, (s + d) % n)) for s in range(n)}
    return [
        oriented(circle, *(int(circle[s]) for s in sorted(link)))
        for link in sorted(links, key=sorted)
    ]


def win_rates(n, pairs, outcomes):
    """Mean over a candidate's comparisons, [n]; an absent verdict is left out on both sides."""
    wins, games = np.zeros(n), np.zeros(n)
    for (first, second), outcome in zip(pairs, outcomes, strict=True):
        if not np.isnan(outcome):
            wins[[first, second]] += outcome, 1 - outcome
            games[[first, second]] += 1
    return np.divide(wins, games, out=np.full(n, np.nan), where=games > 0)
