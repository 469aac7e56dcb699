"""Penalties, KL in the reward, whole-batch standardisation and clipping, in closed form."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from megarl.advantages.group import group_advantages
from megarl.advantages.shaping import add_kl_to_go, clip_advantages, overlong_penalty, standardize


def test_overlong_penalty_is_linear_in_the_buffer() -> None:
    """DAPO's example: 20,480 tokens, the last 4,096 of them the buffer."""
    given = {16_384: 0.0, 16_385: -1 / 4096, 18_432: -0.5, 20_480: -1.0, 20_481: -1.0, 1: 0.0}
    for length, expected in given.items():
        assert overlong_penalty(length, max_tokens=20_480, buffer=4096) == expected


def test_kl_to_go_is_the_sum_from_each_token_on() -> None:
    kls = [np.array([0.5, -0.25, 1.0]), np.array([2.0])]
    first, second = add_kl_to_go([1.0, -1.0], kls, 0.1)
    assert first.tolist() == pytest.approx([1 - 0.125, 1 - 0.075, 1 - 0.1])
    assert second.tolist() == pytest.approx([-1.2])


def test_standardize_counts_tokens_not_sequences() -> None:
    values = [np.array([3.0] * 4), np.array([-1.0]), np.array([0.5, 0.25])]
    flat = [v for part in values for v in part.tolist()]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    for part, own in zip(standardize(values), values, strict=True):
        assert part.tolist() == pytest.approx([(v - mean) / (deviation + 1e-6) for v in own], rel=1e-12)
    everything = np.concatenate(standardize(values, epsilon=0.0))
    assert everything.mean() == pytest.approx(0, abs=1e-12) and everything.std() == pytest.approx(1)


def test_standardize_of_equal_values_is_exactly_zero() -> None:
    assert [v.tolist() for v in standardize([np.full(3, 0.1), np.full(7, 0.1)])] == [[0.0] * 3, [0.0] * 7]
    assert standardize([]) == []


def test_clipping_counts_what_it_changed() -> None:
    clipped, share = clip_advantages([np.array([2.0, -0.5]), np.array([-3.0, 1.0])], 1.0)
    assert [v.tolist() for v in clipped] == [[1.0, -0.5], [-1.0, 1.0]]
    assert share == 0.5
    assert clip_advantages([], 1.0) == ([], 0.0)


def test_no_baseline_divides_by_the_deviation_and_keeps_equal_rewards() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    assert group_advantages([rewards], baseline="none", normalize_std=False) == [rewards]
    [divided] = group_advantages([rewards], baseline="none", epsilon=0.0)
    assert divided == pytest.approx([r * math.sqrt(3) for r in rewards])  # sample deviation 1 / sqrt(3)
    assert group_advantages([[1.0, 1.0], [0.5]], baseline="none") == [[1.0, 1.0], [0.5]]


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """Group mean first, then the deviation of the whole batch (here one token per sample)."""
    groups = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.5]]
    centred = group_advantages(groups, normalize_std=False)
    flat = [a for group in centred for a in group]
    assert flat == [0.5, -0.5, 0.0, 0.0, -0.25, 0.25]
    deviation = math.sqrt((0.25 + 0.25 + 0.0625 + 0.0625) / 6)
    result = standardize([np.array([a]) for a in flat], epsilon=0.0)
    assert [float(r[0]) for r in result] == pytest.approx([a / deviation for a in flat])
