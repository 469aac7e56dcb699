"""Token advantages and returns from a critic's values (GAE: Schulman et al. 2015, arXiv:1506.02438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megarl.ops.gae import gae
from megarl.records import Sample


@dataclass(frozen=True, slots=True)
class TokenAdvantages:
    """Per-token results of GAE: [T] float64 each, aligned with the batch's token ids, 0 at non-targets."""

    advantages: np.ndarray
    returns: np.ndarray
    explained_variance: float | None  # 1 - Var(R - V) / Var(R) over targets; None if all R are equal


def turn_rewards(samples: Sequence[Sample], offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions [K] int64 in the tokens of a batch of ``samples`` and the turn rewards [K] there.

    Each turn's reward is at the last token sampled in it; ``offsets`` [S + 1] are the batch's.
    """
    positions, rewards = [], []
    for sample, start in zip(samples, offsets.tolist(), strict=False):
        position = start + len(sample.prompt_ids)
        if not sample.turns:
            positions.append(position + len(sample.response_ids) - 1)
            rewards.append(float(sample.reward or 0.0))
        for turn in sample.turns:
            positions.append(position + turn.num_sampled - 1)
            rewards.append(turn.reward)
            position += turn.num_sampled + turn.num_observed
    return np.array(positions, dtype=np.int64), np.array(rewards, dtype=np.float64)


def token_advantages(
    positions: np.ndarray,
    rewards: np.ndarray,
    values: np.ndarray,
    targets: np.ndarray,
    offsets: np.ndarray,
    *,
    gamma: float,
    gae_lambda: float,
    normalize: bool,
    kl: np.ndarray | None = None,
    kl_coef: float = 0.0,
    epsilon: float = 1e-8,
) -> TokenAdvantages:
    """Compute GAE of S sequences with T tokens in all, in float64.

    A reward is credited to the last target of its sequence at or before its position (to the first target if
    there is none before it); the reward of every target t is reduced by ``kl_coef * kl[t]``. Normalised
    advantages are ``(A - mean) / (std + epsilon)`` over the targets of all sequences (divisor N), exactly 0
    if all are equal; returns (advantage + value) are not normalised.

    Args:
        positions: [K], tokens with a reward.
        rewards: [K].
        values: [T], the critic's, at the targets.
        targets: [T] bool.
        offsets: [S + 1].
        gamma: discount.
        gae_lambda: lambda of GAE.
        normalize: normalise the advantages.
        kl: [T].
        kl_coef: weight of the KL.
        epsilon: added to the deviation.
    """
    token_rewards = np.zeros(len(values)) if kl is None else -kl_coef * kl
    _add_rewards(token_rewards, positions, rewards, targets, offsets)
    flat_values = torch.from_numpy(np.asarray(values, dtype=np.float64))
    advantages, returns = (
        each.numpy()
        for each in gae(
            torch.from_numpy(token_rewards),
            flat_values,
            torch.from_numpy(targets.astype(np.float32)),
            torch.from_numpy(offsets.astype(np.int32)),
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
    )
    chosen = returns[targets]
    variance = float(chosen.var()) if len(chosen) else 0.0
    explained = None
    if variance > 0:
        explained = 1 - float((chosen - values[targets]).var()) / variance
    if normalize and len(chosen):
        values_at = advantages[targets]
        flat = values_at.min() == values_at.max()
        advantages[targets] = 0.0 if flat else (values_at - values_at.mean()) / (values_at.std() + epsilon)
    return TokenAdvantages(advantages, returns, explained)


def _add_rewards(
    token_rewards: np.ndarray,
    positions: np.ndarray,
    rewards: np.ndarray,
    targets: np.ndarray,
    offsets: np.ndarray,
) -> None:
    target_positions = np.flatnonzero(targets)
    if not len(target_positions):
        return
    rows = np.searchsorted(offsets, positions, side="right") - 1
    last = np.searchsorted(target_positions, positions, side="right") - 1
    before = (last < 0) | (target_positions[last] < offsets[rows])
    last = np.where(before, np.minimum(last + 1, len(target_positions) - 1), last)
    credited = target_positions[last]
    inside = (credited >= offsets[rows]) & (credited < offsets[rows + 1])
    np.add.at(token_rewards, credited[inside], rewards[inside])
