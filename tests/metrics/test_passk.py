"""pass@k and cons@k against every subset written out; intervals against their definitions."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from statistics import NormalDist

import numpy
import pytest

from megarl.metrics.passk import (
    bootstrap_interval,
    consensus_at_k,
    pass_at_k,
    sampled_consensus_at_k,
    wilson_interval,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [True] * correct + [False] * (n - correct)
        subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_stays_exact() -> None:
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-12)
    assert pass_at_k(2000, 3, 2000) == 1.0
    assert pass_at_k(2000, 0, 2000) == 0.0


def _enumerated(votes: list[str | None], right: set[str], k: int) -> float:
    total = 0.0
    subsets = list(itertools.combinations(votes, k))
    for subset in subsets:
        ballots = [vote for vote in subset if vote is not None]
        tops = [v for v in set(ballots) if ballots.count(v) == max(ballots.count(w) for w in set(ballots))]
        total += sum(v in right for v in tops) / len(tops) if tops else 0.0
    return total / len(subsets)


@pytest.mark.parametrize(
    ("votes", "right"),
    [
        ("aabbcd", "a"),
        ("aabbcd", ""),
        ("abcdef", "abcdef"),
        ("aaabbb--c", "b"),  # - gives no vote
        ("aabb-", "ab"),  # two right answers
        ("-----", ""),
        ("aaaaaaab", "b"),
    ],
)
def test_consensus_is_the_average_over_all_subsets(votes: str, right: str) -> None:
    answers = [None if vote == "-" else vote for vote in votes]
    correct = [vote in right for vote in votes]
    for k in range(1, len(votes) + 1):
        expected = _enumerated(answers, set(right), k)
        assert consensus_at_k(answers, correct, k) == pytest.approx(expected, abs=1e-12)


def test_consensus_on_random_ballots_and_its_sampled_form() -> None:
    draw = random.Random(3)
    for _ in range(30):
        n = draw.randint(1, 9)
        answers = [draw.choice(["a", "b", "c", "d", None]) for _ in range(n)]
        k = draw.randint(1, n)
        correct = [vote in ("a", "d") for vote in answers]
        closed = consensus_at_k(answers, correct, k)
        assert closed == pytest.approx(_enumerated(answers, {"a", "d"}, k), abs=1e-12)
        sampled = sampled_consensus_at_k(answers, correct, k, num_draws=4000, seed=1)
        assert sampled == pytest.approx(closed, abs=4 * 0.5 / math.sqrt(4000))


def test_consensus_of_one_sample_is_accuracy_and_of_all_is_the_majority() -> None:
    answers, correct = list("aabbbc"), [vote == "b" for vote in "aabbbc"]
    assert consensus_at_k(answers, correct, 1) == pytest.approx(0.5)
    assert Counter(answers).most_common(1)[0][0] == "b"
    assert consensus_at_k(answers, correct, 6) == 1.0


def test_consensus_of_many_samples_takes_no_enumeration() -> None:
    votes = [str(i % 7) for i in range(64)]
    assert 0 < consensus_at_k(votes, [vote == "0" for vote in votes], 32) < 1


def test_wilson_interval_holds_the_shares_that_the_score_test_accepts() -> None:
    z = NormalDist().inv_cdf(0.975)
    for n, correct in [(1, 0), (10, 3), (50, 50), (400, 117)]:
        low, high = wilson_interval(correct, n)
        for bound in (low, high):
            if 0 < bound < 1:  # the score test's statistic is exactly z there
                statistic = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert statistic == pytest.approx(z, rel=1e-6)
        assert 0 <= low <= correct / n <= high <= 1


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = numpy.random.default_rng(5).random(400)
    low, high = bootstrap_interval(values.tolist())
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
