"""Group advantages in closed form."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import numpy as np
import pytest

from megarl import advantages as module
from megarl.advantages.group import named_rewards
from megarl.errors import UserError
from megarl.records import Sample, token_ids


def ragged(groups: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r for group in groups for r in group]), np.cumsum([0, *map(len, groups)])


def group_advantages(groups: list[list[float]], **options: Any) -> list[list[float]]:
    rewards, bounds = ragged(groups)
    found = module.group_advantages(rewards, bounds, **options)
    return [found[i:j].tolist() for i, j in itertools.pairwise(bounds)]


def zero_std_fraction(groups: list[list[float]]) -> float:
    return module.zero_std_fraction(*ragged(groups))


def test_mean_baseline_by_hand() -> None:
    # Two right, two wrong: mean 1/2, sample deviation sqrt(4 * 0.25 / 3) = 1 / sqrt(3).
    (advantages,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], epsilon=0.0)
    assert advantages == pytest.approx([math.sqrt(3) / 2 * s for s in (1, -1, -1, 1)], rel=1e-14)
    (plain,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], normalize_std=False)
    assert plain == [0.5, -0.5, -0.5, 0.5]


def test_one_right_answer_among_g() -> None:
    """Mean 1/G, variance 1/G: the one right answer gets (G-1)/sqrt(G), the others -1/sqrt(G)."""
    for size in (2, 5, 16):
        (advantages,) = group_advantages([[1.0] + [0.0] * (size - 1)], epsilon=0.0)
        assert advantages[0] == pytest.approx((size - 1) / math.sqrt(size))
        assert advantages[1:] == pytest.approx([-1 / math.sqrt(size)] * (size - 1))


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = [3.0, -1.0, 0.5, 0.5, 7.0]
    (advantages,) = group_advantages([rewards], baseline="leave_one_out", normalize_std=False)
    expected = [r - statistics.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert advantages == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_random_ragged_groups_against_the_statistics_module(baseline: str) -> None:
    rng = random.Random(2)
    groups = [[rng.gauss(3, 2) for _ in range(rng.randint(2, 9))] for _ in range(50)]
    result = group_advantages(groups, baseline=baseline, epsilon=1e-3)
    for rewards, advantages in zip(groups, result, strict=True):
        assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
        for i, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
            others = rewards if baseline == "mean" else rewards[:i] + rewards[i + 1 :]
            expected = (reward - statistics.fmean(others)) / (statistics.stdev(rewards) + 1e-3)
            assert advantage == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(baseline: str) -> None:
    groups = [[0.1] * 3, [1 / 3] * 7, [0.0] * 4, [-2.7] * 2]
    assert sum([0.1] * 3) / 3 != 0.1, "the residue this guards against"
    result = group_advantages(groups, baseline=baseline, epsilon=0.0)
    assert result == [[0.0] * len(g) for g in groups]


def test_degenerate_shapes() -> None:
    assert group_advantages([]) == []
    assert group_advantages([[], [4.0]]) == [[], [0.0]]
    assert zero_std_fraction([]) == 0.0
    assert zero_std_fraction([[1.0, 1.0], [0.0, 1.0], [2.0], [0.3, 0.3, 0.3]]) == 0.75


def test_user_errors_name_the_group() -> None:
    with pytest.raises(UserError, match="sample 1 in group 2 is nan"):
        group_advantages([[1.0], [2.0], [0.0, math.nan]])
    with pytest.raises(UserError, match="leave_one_out.*group 1 has 1"):
        group_advantages([[1.0, 2.0], [2.0]], baseline="leave_one_out")


@pytest.mark.parametrize("normalize_std", [True, False])
def test_length_weighted_by_hand(normalize_std: bool) -> None:
    """OPO: sum of length x reward over the sum of lengths."""
    groups, lengths = [[1.0, 0.0, 0.5], [2.0, 2.0], [3.0, -1.0]], [10, 30, 0, 4, 5, 7, 1]
    found = module.group_advantages(
        *ragged(groups),
        baseline="length_weighted",
        normalize_std=normalize_std,
        lengths=np.array(lengths),
    )
    first, last = 10 / 40, (21 - 1) / 8
    expected = [1 - first, -first, 0.5 - first, 0.0, 0.0, 3 - last, -1 - last]
    if normalize_std:
        deviations = [statistics.stdev(groups[0]) + 1e-6] * 3 + [1, 1]
        deviations += [statistics.stdev(groups[2]) + 1e-6] * 2
        expected = [a / d for a, d in zip(expected, deviations, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found[3] == found[4] == 0
    # its expectation over the group is not 0, that weighted by lengths is
    assert np.dot(found[:3], lengths[:3]) == pytest.approx(0, abs=1e-12)


def sample_with(**info: Any) -> Sample:
    none = np.zeros(0, dtype=np.float32)
    return Sample(7, token_ids([1]), token_ids([2]), none, 0, "stop", info=info)


def test_named_rewards() -> None:
    samples = [sample_with(rewards={"a": 1, "b": 0.5, "c": None}), sample_with(rewards={"b": -2.0, "a": 3})]
    assert named_rewards(samples, ["b", "a"]).tolist() == [[0.5, -2.0], [1.0, 3.0]]
    for bad, has in (
        ({"rewards": {"a": 1}}, "a"),
        ({}, "none"),
        ({"rewards": {"a": 1, "b": math.nan}}, "a, b"),
        ({"rewards": {"b": "1"}}, "b"),
    ):
        with pytest.raises(UserError, match=rf"prompt 7 has no finite reward 'b' .*gave: {has}\)"):
            named_rewards([sample_with(**bad)], ["b"])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_greedy_baseline_by_hand(normalize_std: bool) -> None:
    """ReMax: what the greedy response earns; it needs no second sample, and equal rewards still teach."""
    groups, greedy = [[1.0, 0.0, 0.5], [2.0, 2.0], [3.0]], [0.25, 1.5, 4.0]
    found = module.group_advantages(
        *ragged(groups), baseline="greedy", normalize_std=normalize_std, greedy=np.array(greedy)
    )
    expected = [0.75, -0.25, 0.25, 0.5, 0.5, -1.0]
    if normalize_std:
        deviations = [statistics.stdev(groups[0]) + 1e-6] * 3 + [1, 1, 1]
        expected = [a / d for a, d in zip(expected, deviations, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
