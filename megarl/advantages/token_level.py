"""Advantages and returns of tokens from a critic's values (GAE: Schulman et al. 2015, arXiv:1506.02438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megarl.ops.gae import gae
from megarl.records import Sample


@dataclass(frozen=True, slots=True)
class TokenAdvantages:
    """[T] float64 each, aligned with the batch's token ids, 0 where there is no target."""

    advantages: np.ndarray
    returns: np.ndarray
    explained_variance: float | None  # 1 - Var(R - V) / Var(R) over targets; None where all R are equal


def turn_rewards(samples: Sequence[Sample], offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [K] int64 in the tokens of a batch of ``samples``, and the rewards [K] that come there.

    Each turn's reward comes with the last token that was sampled in it; ``offsets`` [S + 1] are the batch's.
    """
    places, rewards = [], []
    for sample, start in zip(samples, offsets.tolist(), strict=False):
        place = start + len(sample.prompt_ids)
        if not sample.turns:
            places.append(place + len(sample.response_ids) - 1)
            rewards.append(float(sample.reward or 0.0))
        for turn in sample.turns:
            places.append(place + turn.num_sampled - 1)
            rewards.append(turn.reward)
            place += turn.num_sampled + turn.num_observed
    return np.array(places, dtype=np.int64), np.array(rewards, dtype=np.float64)


def token_advantages(
    places: np.ndarray,
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
    """GAE of S sequences of T tokens, float64.

    A reward comes with the last target of its sequence up to its place (before the first target: with that
    one); the reward of every target t is less by ``kl_coef * kl[t]``. Normalised advantages are
    ``(A - mean) / (std + epsilon)`` over the targets of all sequences (divisor N), exactly 0 where all are
    equal; returns (advantage + value) are not changed by it.

    Args:
        places: [K] tokens to which rewards come.
        rewards: [K].
        values: [T], the critic's of the targets.
        targets: [T] bool.
        offsets: [S + 1].
        gamma: discount.
        gae_lambda: of GAE.
        normalize: advantages only.
        kl: [T].
        kl_coef: its weight.
        epsilon: added to the deviation.
    """
    token_rewards = np.zeros(len(values)) if kl is None else -kl_coef * kl
    _add_rewards(token_rewards, places, rewards, targets, offsets)
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
        own = advantages[targets]
        flat = own.min() == own.max()
        advantages[targets] = 0.0 if flat else (own - own.mean()) / (own.std() + epsilon)
    return TokenAdvantages(advantages, returns, explained)


def _add_rewards(
    token_rewards: np.ndarray,
    places: np.ndarray,
    rewards: np.ndarray,
    targets: np.ndarray,
    offsets: np.ndarray,
) -> None:
    positions = np.flatnonzero(targets)
    if not len(positions):
        return
    rows = np.searchsorted(offsets, places, side="right") - 1
    last = np.searchsorted(positions, places, side="right") - 1
    before = (last < 0) | (positions[last] < offsets[rows])
    last = np.where(before, np.minimum(last + 1, len(positions) - 1), last)
    inside = (positions[last] >= offsets[rows]) & (positions[last] < offsets[rows + 1])
    np.add.at(token_rewards, positions[last[inside]], rewards[inside])
