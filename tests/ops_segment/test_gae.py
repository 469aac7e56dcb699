"""GAE against its definition as a sum, closed forms, and edge cases."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from megarl.ops.gae import gae


def by_definition(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_(t + l), term by term, not by recursion."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_definition_on_ragged_masked_sequences(dtype: torch.dtype, tolerance: float) -> None:
    rng = random.Random(0)
    for _ in range(20):
        sizes = [rng.choice([0, 1, 2, 5, 33, 70]) for _ in range(rng.randint(1, 7))]
        cu = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        gamma, gae_lambda = rng.choice([1.0, 0.99, 0.5, 0.0]), rng.choice([1.0, 0.95, 0.0])
        rewards, values = torch.randn(cu[-1], dtype=dtype), torch.randn(cu[-1], dtype=dtype)
        mask = (torch.rand(cu[-1]) < 0.7).float()
        bounds = torch.tensor(cu, dtype=torch.int32)
        found = gae(rewards, values, mask, bounds, gamma=gamma, gae_lambda=gae_lambda)
        expected = torch.zeros(cu[-1], dtype=torch.float64)
        for start, end in pairwise(cu):
            kept = [t for t in range(start, end) if mask[t]]
            expected[kept] = torch.tensor(
                by_definition(rewards[kept].tolist(), values[kept].tolist(), gamma, gae_lambda),
                dtype=torch.float64,
            )
        torch.testing.assert_close(found.advantages.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            found.returns.double(), expected + values * mask, rtol=tolerance, atol=tolerance
        )


def test_lambda_one_is_the_return_minus_the_value() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7], dtype=torch.float64)
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    found = gae(rewards, values, torch.ones(5), cu, gamma=1.0, gae_lambda=1.0)
    expected_returns = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found.returns, expected_returns)
    torch.testing.assert_close(found.advantages, expected_returns - values)


def test_nan_off_the_mask_does_not_spread() -> None:
    nan = float("nan")
    rewards, values = torch.tensor([nan, 1.0, nan]), torch.tensor([nan, 0.5, nan])
    mask, cu = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 3], dtype=torch.int32)
    found = gae(rewards, values, mask, cu, gamma=1.0, gae_lambda=0.95)
    assert found.advantages.tolist() == [0.0, 0.5, 0.0]
    assert found.returns.tolist() == [0.0, 1.0, 0.0]


def test_advantages_carry_no_gradient() -> None:
    values = torch.randn(3, requires_grad=True)
    found = gae(
        torch.ones(3),
        values,
        torch.ones(3),
        torch.tensor([0, 3], dtype=torch.int32),
        gamma=1.0,
        gae_lambda=1.0,
    )
    assert not found.advantages.requires_grad


def test_wrong_arguments_and_opcheck() -> None:
    x, mask, cu = torch.randn(3), torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"gae: gamma must lie in \[0, 1\], got 1.5"):
        gae(x, x, mask, cu, gamma=1.5, gae_lambda=1.0)
    with pytest.raises(ValueError, match="values must be Float, got Double"):
        gae(x, x.double(), mask, cu, gamma=1.0, gae_lambda=1.0)
    torch.library.opcheck(torch.ops.megarl.gae.default, (x, x.clone(), mask, cu, 0.99, 0.95))
