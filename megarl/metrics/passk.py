"""pass@k and cons@k from n samples per problem, and confidence intervals.

pass@k = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374): the probability that a random subset of
k of the n samples contains at least one of the c correct ones; unbiased. cons@k: the probability that the
majority answer of k samples is correct (self-consistency, Wang et al. 2022, arXiv:2203.11171), over all
subsets in closed form or over random ones.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Literal

import numpy

CONFIDENCE = 0.95
"""Confidence level of all intervals."""
_NORMAL_QUANTILE = 1.959963984540054  # of (1 + CONFIDENCE) / 2
_BOOTSTRAP_DRAWS = 2000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that k of ``num_samples`` contain a correct sample; 1 <= k <= num_samples."""
    assert 0 <= num_correct <= num_samples, f"{num_correct} of {num_samples}"
    assert 1 <= k <= num_samples, f"k = {k} of {num_samples} samples"
    failing = Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))
    return float(1 - failing)


def consensus_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the majority answer of k samples is correct, over all subsets of k.

    Args:
        votes: the samples' answers [n]; None is no vote. Equal answers vote together.
        correct: whether each sample is correct [n]; equal for equal answers.
        k: size of the subsets, 1 <= k <= n.

    Ties are broken uniformly at random. A subset without votes is wrong. Exact: for each correct answer and
    number j of its votes, count the ways in which every other answer gets fewer than j votes, or j (a tie);
    about (number of answers) * k^3 steps.
    """
    sizes, right = _classes(votes, correct)
    n = len(votes)
    assert 1 <= k <= n, f"k = {k} of {n} samples"
    silent = sum(vote is None for vote in votes)
    total = Fraction(0)
    for answer in right:
        others = [size for other, size in sizes.items() if other != answer]
        for j in range(1, min(sizes[answer], k) + 1):
            own = math.comb(sizes[answer], j)
            for ties, ways in enumerate(_ways(others, silent, k - j, j)):
                total += Fraction(own * ways, 1 + ties)
    return float(total / math.comb(n, k))


def _ways(sizes: list[int], silent: int, room: int, most: int) -> list[int]:
    """Return, by number of ties, the ways to draw ``room`` votes with at most ``most`` per answer (a tie)."""
    table = {(0, 0): 1}  # (places taken, ties) -> ways
    for size in sizes:
        grown: dict[tuple[int, int], int] = {}
        for (taken, ties), ways in table.items():
            for votes in range(min(size, most, room - taken) + 1):
                key = taken + votes, ties + (votes == most)
                grown[key] = grown.get(key, 0) + ways * math.comb(size, votes)
        table = grown
    counts = [0] * (len(sizes) + 1)
    for (taken, ties), ways in table.items():
        counts[ties] += ways * math.comb(silent, room - taken)
    return counts


def sampled_consensus_at_k(
    votes: Sequence[Hashable | None], correct: Sequence[bool], k: int, num_draws: int, seed: int
) -> float:
    """Estimate :func:`consensus_at_k` from ``num_draws`` random subsets.

    The standard error is at most 0.5 / sqrt(num_draws).
    """
    _, right = _classes(votes, correct)
    assert 1 <= k <= len(votes), f"k = {k} of {len(votes)} samples"
    draw = random.Random(seed)
    total = 0.0
    for _ in range(num_draws):
        counts = Counter(vote for vote in draw.sample(votes, k) if vote is not None)
        if counts:
            most = max(counts.values())
            leaders = [vote for vote, count in counts.items() if count == most]
            total += sum(vote in right for vote in leaders) / len(leaders)
    return total / num_draws


def _classes(
    votes: Sequence[Hashable | None], correct: Sequence[bool]
) -> tuple[Counter[Hashable], set[Hashable]]:
    sizes: Counter[Hashable] = Counter(vote for vote in votes if vote is not None)
    pairs = {(vote, is_right) for vote, is_right in zip(votes, correct, strict=True) if vote is not None}
    assert len(pairs) == len(sizes), "the same answer was judged right and wrong"
    return sizes, {vote for vote, is_right in pairs if is_right}


def wilson_interval(num_correct: int, num_trials: int) -> tuple[float, float]:
    """Return the Wilson score interval (Wilson 1927) of a proportion; valid also for 0 or all correct."""
    z2 = _NORMAL_QUANTILE**2
    share = num_correct / num_trials
    middle = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = share * (1 - share) / num_trials + z2 / (4 * num_trials**2)
    half = _NORMAL_QUANTILE / (1 + z2 / num_trials) * math.sqrt(spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron 1979) of the mean; ``values`` has one per problem."""
    array = numpy.asarray(values, dtype=numpy.float64)
    draw = numpy.random.default_rng(seed)
    means = numpy.array(
        [array[draw.integers(0, len(array), len(array))].mean() for _ in range(_BOOTSTRAP_DRAWS)]
    )
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


IntervalMethod = Literal["wilson", "bootstrap"]
