"""Which pairs of candidates a pairwise judge is asked about, and what score each candidate gets.

In: the number n of candidates. `schedule` is a generator: it yields rounds of (first, second)
pairs, is sent the outcomes (1 first wins, 0 second wins, between with repeated samples, nan
absent), and returns the scores [n]. Nothing here knows a judge, so schedules can be simulated."""

from collections import Counter

import numpy as np


def schedule(comparisons, n, pivot, rng, bonus=0.0):
    """comparisons: "all", "pivot", an int R (every candidate meets R others, drawn at random), or
    "race" (best and worst at a quarter of the questions; "race:0.5" at half of them). bonus [n]:
    what other rewards add, so that the race is about the best and the worst of the sum."""
    name, _, share = str(comparisons).partition(":")
    if name not in ("all", "pivot", "race") and not name.isdigit():
        raise ValueError(f"comparisons: {comparisons!r} is not all, pivot, race or a number")
    if n < 2:
        return np.full(n, 0.5)  # alone, a tie with itself
    circle = rng.permutation(n)  # who is shown first follows from the seats, see `oriented`
    if name == "race" and n > 4:  # so few are done sooner with all pairs
        return (yield from race(circle, float(share or 0.25), rng, bonus))
    if name == "pivot":
        pairs = [oriented(circle, pivot, other) for other in range(n) if other != pivot]
    else:
        pairs = circulant(circle, int(name) if name.isdigit() else n - 1, rng)
    outcomes = yield pairs
    return win_rates(n, pairs, outcomes)


def race(circle, share, rng, bonus):
    """Everybody meets one other. Then, at both ends of the ranking so far, the contenders meet
    whom they have met least, and of those the next in rank; there are half as many contenders in
    each round, down to the last two, who meet in both orders until the budget is spent."""
    n = len(circle)
    budget = round(max(share * n * (n - 1) / 2, 1.5 * n))
    pairs = circulant(circle, 1, rng)
    outcomes = list((yield pairs))
    met = Counter(frozenset(pair) for pair in pairs)
    contenders = (n + 1) // 2
    while len(pairs) < budget:
        rank = expected_wins(n, pairs, outcomes) + bonus + 1e-6 * rng.random(n)  # no favourites
        new = []
        for ranked in (np.argsort(-rank), np.argsort(rank)):
            ahead = ranked[: max(2, contenders)].tolist()
            while len(ahead) > 1:
                one = ahead.pop(0)
                other = min(ahead, key=lambda x: met[frozenset((one, x))])  # noqa: B023
                ahead.remove(other)
                pair, again = oriented(circle, one, other), met[frozenset((one, other))]
                new.append(pair[::-1] if again % 2 else pair)
                met[frozenset(pair)] += 1
        new = [new[i] for i in rng.permutation(len(new))[: budget - len(pairs)]]
        outcomes += yield new
        pairs = pairs + new
        contenders = (contenders + 1) // 2
    unjudged = np.isnan(win_rates(n, pairs, outcomes))
    return np.where(unjudged, np.nan, expected_wins(n, pairs, outcomes))


def expected_wins(n, pairs, outcomes, prior=0.5):
    """Win rate against all others that a Bradley-Terry model of the outcomes expects, [n]: what
    all pairs would give, whomever one has met. The prior (on squared logits) draws to a half."""
    outcomes = np.array(outcomes, dtype=float)
    played = ~np.isnan(outcomes)
    first, second = np.array(pairs)[played].reshape(-1, 2).T
    design = np.eye(n)[first] - np.eye(n)[second]  # [questions, n]
    logits = np.zeros(n)
    for _ in range(6):  # Newton steps on a concave function
        chance = 1 / (1 + np.exp(-design @ logits))
        slope = design.T @ (outcomes[played] - chance) - prior * logits
        bend = (design.T * (chance * (1 - chance))) @ design + prior * np.eye(n)
        logits += np.linalg.solve(bend, slope)
    wins = 1 / (1 + np.exp(logits - logits[:, None]))  # [n, n], i against j
    return (wins.sum(1) - 0.5) / (n - 1)


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
