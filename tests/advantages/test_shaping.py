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
    found = overlong_penalty(np.array(list(given)), max_tokens=20_480, buffer=4096)
    assert found.tolist() == list(given.values())


def test_kl_to_go_is_the_sum_from_each_token_on() -> None:
    kl, offsets = np.array([0.5, -0.25, 1.0, 2.0]), np.array([0, 3, 4])
    found = add_kl_to_go(np.array([1.0, -1.0]), kl, offsets, 0.1)
    assert found.tolist() == pytest.approx([1 - 0.125, 1 - 0.075, 1 - 0.1, -1.2])


def test_standardize_counts_tokens_not_sequences() -> None:
    """One value per sequence with its token count gives the same result as one value per token."""
    flat = [3.0] * 4 + [-1.0] + [0.5, 0.25]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    expected = [(v - mean) / (deviation + 1e-6) for v in flat]
    by_token = standardize(np.array(flat), np.ones(7, dtype=np.int64))
    assert by_token.tolist() == pytest.approx(expected, rel=1e-12)
    by_run = standardize(np.array([3.0, -1.0, 0.5, 0.25, 99.0]), np.array([4, 1, 1, 1, 0]))
    assert by_run[:4].tolist() == pytest.approx([expected[i] for i in (0, 4, 5, 6)], rel=1e-12)
    everything = standardize(np.array(flat), np.ones(7, dtype=np.int64), epsilon=0.0)
    assert everything.mean() == pytest.approx(0, abs=1e-12) and everything.std() == pytest.approx(1)


def test_standardize_of_equal_values_is_exactly_zero() -> None:
    assert standardize(np.full(10, 0.1), np.ones(10, dtype=np.int64)).tolist() == [0.0] * 10
    assert standardize(np.array([0.1, 0.1, 7.0]), np.array([3, 7, 0])).tolist() == [0.0] * 3
    assert standardize(np.zeros(0), np.zeros(0, dtype=np.int64)).tolist() == []


def test_clipping_counts_what_it_changed() -> None:
    clipped, share = clip_advantages(np.array([2.0, -0.5, -3.0, 1.0]), np.ones(4, dtype=np.int64), 1.0)
    assert clipped.tolist() == [1.0, -0.5, -1.0, 1.0]
    assert share == 0.5
    assert clip_advantages(np.array([2.0, 0.5]), np.array([3, 1]), 1.0)[1] == 0.75, "of the tokens"
    empty, share = clip_advantages(np.zeros(0), np.zeros(0, dtype=np.int64), 1.0)
    assert (len(empty), share) == (0, 0.0)


def test_no_baseline_divides_by_the_deviation_and_keeps_equal_rewards() -> None:
    rewards, bounds = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 4])
    plain = group_advantages(rewards, bounds, baseline="none", normalize_std=False)
    assert plain.tolist() == rewards.tolist()
    divided = group_advantages(rewards, bounds, baseline="none", epsilon=0.0)
    assert divided.tolist() == pytest.approx([r * math.sqrt(3) for r in rewards])  # deviation 1 / sqrt(3)
    equal = group_advantages(np.array([1.0, 1.0, 0.5]), np.array([0, 2, 3]), baseline="none")
    assert equal.tolist() == [1.0, 1.0, 0.5]


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """Group mean first, then the deviation of the whole batch (here one token per sample)."""
    rewards = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.5])
    centred = group_advantages(rewards, np.array([0, 2, 4, 6]), normalize_std=False)
    assert centred.tolist() == [0.5, -0.5, 0.0, 0.0, -0.25, 0.25]
    deviation = math.sqrt((0.25 + 0.25 + 0.0625 + 0.0625) / 6)
    result = standardize(centred, np.ones(6, dtype=np.int64), epsilon=0.0)
    assert result.tolist() == pytest.approx([a / deviation for a in centred.tolist()])
