"""The group_advantage op against the statistics module; tests/advantages has the closed forms."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from megarl.ops.group_advantage import group_advantage


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_equals_the_statistics_module(
    dtype: torch.dtype, tolerance: float, leave_one_out: bool, normalize_std: bool
) -> None:
    rng = random.Random(3)
    groups = [[rng.gauss(2, 3) for _ in range(rng.choice([0, 1, 2, 3, 8, 33]))] for _ in range(40)]
    groups += [[0.7] * 5, [1.0, 0.0]]
    rewards = torch.tensor([r for g in groups for r in g], dtype=dtype)
    cu = torch.tensor([sum(map(len, groups[:i])) for i in range(len(groups) + 1)], dtype=torch.int32)
    found = group_advantage(
        rewards, cu, leave_one_out=leave_one_out, normalize_std=normalize_std, epsilon=1e-4
    )
    expected = []
    for rounded in rewards.double().split([len(g) for g in groups]):
        group = rounded.tolist()
        for i, reward in enumerate(group):
            if min(group) == max(group):
                expected.append(0.0)
                continue
            others = group[:i] + group[i + 1 :] if leave_one_out else group
            scale = statistics.stdev(group) + 1e-4 if normalize_std else 1.0
            expected.append((reward - statistics.fmean(others)) / scale)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def test_small_spread_on_a_large_offset() -> None:
    """E[x^2] - E[x]^2 would have no digit left here."""
    rewards = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    found = group_advantage(rewards, torch.tensor([0, 3], dtype=torch.int32), epsilon=0.0)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


def test_wrong_arguments_and_opcheck() -> None:
    rewards, cu = torch.randn(6), torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="group_advantage: cu_groups must run from 0 to 6, found 0 to 4"):
        group_advantage(rewards, cu[:2])
    with pytest.raises(ValueError, match="epsilon must not be negative, got -1"):
        group_advantage(rewards, cu, epsilon=-1.0)
    torch.library.opcheck(torch.ops.megarl.group_advantage.default, (rewards, cu, True, True, 1e-6))
