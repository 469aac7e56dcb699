"""Group-relative advantages.

GRPO: Shao et al. 2024, arXiv:2402.03300; RLOO: arXiv:2402.14740; OPO: arXiv:2505.23585; GDPO:
arXiv:2601.05242; ReMax: arXiv:2310.10505.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from megarl.errors import UserError
from megarl.ops.group_advantage import group_advantage
from megarl.records import Sample

Baseline = Literal["mean", "leave_one_out", "length_weighted", "greedy", "none"]


def group_advantages(
    rewards: np.ndarray,
    bounds: np.ndarray,
    *,
    baseline: Baseline = "mean",
    normalize_std: bool = True,
    epsilon: float = 1e-6,
    lengths: np.ndarray | None = None,
    greedy: np.ndarray | None = None,
) -> np.ndarray:
    """Return group-relative advantages, ``A_i = (r_i - b_i) / (std + epsilon)``.

    ``b_i`` is the mean of the group ("mean"), the mean without sample i ("leave_one_out"; r_i - b_i is then
    G / (G - 1) times as large), the mean weighted by ``lengths`` ("length_weighted", OPO: the baseline of
    least variance if a sample's squared gradient grows with its length), the reward of the greedy response
    ("greedy", ReMax: the rewards in ``greedy``), or 0 ("none"). ``std`` is the
    *sample* standard deviation (divisor G - 1) of the whole group for every baseline, as in TRL 1.16 and NeMo
    RL, except that NeMo RL excludes sample i from the deviation too if it does so for the baseline.

    A group whose rewards are all equal gives no gradient: its advantages are exactly 0 (without a baseline
    of its samples they are not divided). The test compares rewards, not a computed deviation, whose rounding
    residue (0.1 + 0.1 + 0.1 is not 0.3) would be amplified to +-1.

    Args:
        rewards: [S], groups end to end.
        bounds: [G + 1]: group g has samples bounds[g] to bounds[g + 1].
        baseline: what is subtracted.
        normalize_std: divide by the deviation.
        epsilon: added to the deviation.
        lengths: [S] tokens that were sampled, for "length_weighted".
        greedy: [G] rewards of the groups' greedy responses, for "greedy".

    Returns:
        Advantages [S] float64.

    Raises:
        UserError: a reward is not finite, or leave_one_out meets a group of one.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    _check(rewards, bounds, baseline)
    if baseline in ("none", "length_weighted", "greedy"):
        deviation, center = np.ones(len(rewards)), np.zeros(len(rewards))
        for group, (start, end) in enumerate(pairwise(bounds)):
            own = rewards[start:end]
            if baseline == "greedy":
                assert greedy is not None
                center[start:end] = greedy[group]
            elif baseline == "length_weighted":
                assert lengths is not None
                weights = np.asarray(lengths[start:end], dtype=np.float64)
                total = weights.sum()
                even = is_degenerate(own) or total == 0
                center[start:end] = own if even else (weights * own).sum() / total
            if normalize_std and not is_degenerate(own):
                deviation[start:end] = own.std(ddof=1) + epsilon
        return (rewards - center) / deviation
    advantages = group_advantage(
        torch.from_numpy(rewards),
        torch.from_numpy(np.asarray(bounds, dtype=np.int32)),
        leave_one_out=baseline == "leave_one_out",
        normalize_std=normalize_std,
        epsilon=epsilon,
    )
    return advantages.numpy()


def named_rewards(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """[K, S] float64: the rewards that environments give under these names, in info["rewards"].

    Raises:
        UserError: a sample has none of a name, or no finite number.
    """
    found = np.zeros((len(names), len(samples)))
    for i, sample in enumerate(samples):
        given = sample.info.get("rewards")
        for k, name in enumerate(names):
            value = given.get(name) if isinstance(given, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                has = ", ".join(map(str, given)) if isinstance(given, dict) and given else "none"
                raise UserError(
                    f"algorithm.reward_weights: a sample of prompt {sample.prompt_index} has no finite "
                    f"reward {name!r} in info['rewards'] (its environment gave: {has})"
                )
            found[k, i] = value
    return found


def zero_std_fraction(rewards: np.ndarray, bounds: np.ndarray) -> float:
    """Return the share of groups with all rewards equal, which give no gradient; 0.0 without groups."""
    degenerate = [is_degenerate(rewards[start:end]) for start, end in pairwise(bounds)]
    return sum(degenerate) / len(degenerate) if degenerate else 0.0


def is_degenerate(rewards: np.ndarray) -> bool:
    """Return True if all rewards [G] of a group are equal (also for an empty group or a group of one)."""
    return len(rewards) == 0 or bool(np.min(rewards) == np.max(rewards))


def _check(rewards: np.ndarray, bounds: np.ndarray, baseline: Baseline) -> None:
    def group_of(sample: int) -> int:
        return int(np.searchsorted(bounds, sample, side="right")) - 1

    if len(bad := np.flatnonzero(~np.isfinite(rewards))):
        group = group_of(int(bad[0]))
        raise UserError(f"reward of sample {bad[0] - bounds[group]} in group {group} is {rewards[bad[0]]}")
    if baseline == "leave_one_out" and len(alone := np.flatnonzero(np.diff(bounds) == 1)):
        raise UserError(
            f"algorithm.baseline = leave_one_out needs at least 2 samples per group, group {alone[0]} has 1"
        )
