"""Group-relative advantages (GRPO: Shao et al. 2024, arXiv:2402.03300; RLOO: arXiv:2402.14740)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from megarl.errors import UserError
from megarl.ops.group_advantage import group_advantage

Baseline = Literal["mean", "leave_one_out", "none"]


def group_advantages(
    rewards: Sequence[Sequence[float]],
    *,
    baseline: Baseline = "mean",
    normalize_std: bool = True,
    epsilon: float = 1e-6,
) -> list[list[float]]:
    """Advantages of samples relative to their group, ``A_i = (r_i - b_i) / (std + epsilon)``.

    ``b_i`` is the mean of the group ("mean"), of the group without sample i ("leave_one_out", which is
    G / (G - 1) times as far from r_i), or 0 ("none"). ``std`` is the *sample* standard deviation (divisor
    G - 1) of the whole group, with every baseline: what TRL 1.16 and NeMo RL divide by, except that NeMo RL
    leaves sample i out of the deviation too when it does so for the baseline.

    A group whose rewards are all equal has nothing to teach: its advantages are exactly 0 (without a
    baseline they are the rewards, not divided). Equality is tested on the rewards, not on a computed
    deviation, because rounding leaves a residue there (0.1 + 0.1 + 0.1 is not 0.3) that dividing would
    blow up to +-1.

    Args:
        rewards: one list per group; groups may differ in size.
        baseline: what is subtracted.
        normalize_std: divide by the deviation.
        epsilon: added to the deviation.

    Returns:
        Advantages in the shape of ``rewards``, computed in double precision.

    Raises:
        UserError: a reward is not finite, or leave_one_out meets a group of one.
    """
    sizes = [len(group) for group in rewards]
    _check(rewards, baseline)
    if baseline == "none":
        return [_without_baseline(group, epsilon if normalize_std else None) for group in rewards]
    advantages = group_advantage(
        torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64),
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
        leave_one_out=baseline == "leave_one_out",
        normalize_std=normalize_std,
        epsilon=epsilon,
    )
    return [group.tolist() for group in advantages.split(sizes)]


def zero_std_fraction(rewards: Sequence[Sequence[float]]) -> float:
    """Share of the groups whose rewards are all equal and which therefore give no gradient; 0.0 of none."""
    return sum(is_degenerate(group) for group in rewards) / len(rewards) if rewards else 0.0


def is_degenerate(rewards: Sequence[float]) -> bool:
    """True where all rewards [G] of a group are equal (a group of one, or of none, included)."""
    return len(rewards) == 0 or min(rewards) == max(rewards)


def _without_baseline(rewards: Sequence[float], epsilon: float | None) -> list[float]:
    if epsilon is None or is_degenerate(rewards):
        return list(rewards)
    deviation = statistics.stdev(rewards)
    return [reward / (deviation + epsilon) for reward in rewards]


def _check(rewards: Sequence[Sequence[float]], baseline: Baseline) -> None:
    for g, group in enumerate(rewards):
        for i, reward in enumerate(group):
            if not math.isfinite(reward):
                raise UserError(f"reward of sample {i} in group {g} is {reward}")
        if baseline == "leave_one_out" and len(group) == 1:
            raise UserError(
                f"algorithm.baseline = leave_one_out needs at least 2 samples per group, group {g} has 1"
            )
