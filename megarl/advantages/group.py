"""Group-relative advantages (GRPO: Shao et al. 2024, arXiv:2402.03300; RLOO: arXiv:2402.14740)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from megarl.errors import UserError

Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards: Sequence[Sequence[float]],
    *,
    baseline: Baseline = "mean",
    normalize_std: bool = True,
    epsilon: float = 1e-6,
) -> list[list[float]]:
    """Advantages of samples relative to their group, ``A_i = (r_i - b_i) / (std + epsilon)``.

    ``b_i`` is the mean of the group ("mean") or of the group without sample i ("leave_one_out", which is
    G / (G - 1) times as far from r_i). ``std`` is the *sample* standard deviation of the whole group
    (divisor G - 1), with either baseline: what TRL 1.16 and NeMo RL divide by, except that NeMo RL leaves
    sample i out of the deviation too when it does so for the baseline.

    A group whose rewards are all equal has nothing to teach: its advantages are exactly 0. Equality is
    tested on the rewards, not on a computed deviation, because rounding leaves a residue there
    (0.1 + 0.1 + 0.1 is not 0.3) that dividing would blow up to +-1.

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
    return [_one_group(list(group), g, baseline, normalize_std, epsilon) for g, group in enumerate(rewards)]


def zero_std_fraction(rewards: Sequence[Sequence[float]]) -> float:
    """Share of the groups whose rewards are all equal and which therefore give no gradient; 0.0 of none."""
    return sum(is_degenerate(group) for group in rewards) / len(rewards) if rewards else 0.0


def is_degenerate(rewards: Sequence[float]) -> bool:
    """True where all rewards [G] of a group are equal (a group of one, or of none, included)."""
    return len(rewards) == 0 or min(rewards) == max(rewards)


def _one_group(
    rewards: list[float], group: int, baseline: Baseline, normalize_std: bool, epsilon: float
) -> list[float]:
    size = len(rewards)
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise UserError(f"reward of sample {i} in group {group} is {reward}")
    if baseline == "leave_one_out" and size == 1:
        raise UserError(
            f"algorithm.baseline = leave_one_out needs at least 2 samples per group, group {group} has 1"
        )
    if is_degenerate(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    deviations = [reward - mean for reward in rewards]
    scale = size / (size - 1) if baseline == "leave_one_out" else 1.0
    if normalize_std:
        scale /= math.sqrt(math.fsum(d * d for d in deviations) / (size - 1)) + epsilon
    return [d * scale for d in deviations]
