"""Advantages and returns of tokens from a critic's values (GAE: Schulman et al. 2015, arXiv:1506.02438)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from megarl.ops.gae import gae
from megarl.records import Sample

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenAdvantages:
    """Per sequence [n], aligned with its token ids, 0 where there is no target."""

    advantages: list[Array]
    returns: list[Array]
    explained_variance: float | None  # 1 - Var(R - V) / Var(R) over targets; None where all R are equal


def token_rewards(sample: Sample) -> list[tuple[int, float]]:
    """(place in prompt + response, reward): each turn's with the last token that was sampled in it."""
    place = len(sample.prompt_ids)
    if not sample.turns:
        return [(place + len(sample.response_ids) - 1, float(sample.reward or 0.0))]
    found = []
    for turn in sample.turns:
        found.append((place + turn.num_sampled - 1, turn.reward))
        place += turn.num_sampled + turn.num_observed
    return found


def token_advantages(
    rewards: Sequence[Sequence[tuple[int, float]]],
    values: Sequence[Array],
    masks: Sequence[Sequence[int]],
    *,
    gamma: float,
    gae_lambda: float,
    normalize: bool,
    kls: Sequence[Array] | None = None,
    kl_coef: float = 0.0,
    epsilon: float = 1e-8,
) -> TokenAdvantages:
    """GAE of S sequences, float64, given the rewards of each: (place of the token, reward).

    A reward comes with the last target up to its place (before the first target: with that one).
    The reward of every target t is less by ``kl_coef * kls[t]``. Normalised advantages are
    ``(A - mean) / (std + epsilon)`` over the targets of all sequences (divisor N), exactly 0 where all are
    equal; returns (advantage + value) are not changed by it. ``masks`` are loss masks, of which position 0 is
    ignored.
    """
    sizes = [len(mask) for mask in masks]
    flat_mask = torch.tensor([m for mask in masks for m in (0, *mask[1:])], dtype=torch.float32)
    ends = list(accumulate(sizes))
    flat_values = torch.from_numpy(np.concatenate(values))
    flat_rewards = torch.zeros(sum(sizes), dtype=torch.float64)
    if kls is not None:
        flat_rewards -= kl_coef * torch.from_numpy(np.concatenate(kls))
    for own_rewards, mask, end in zip(rewards, masks, ends, strict=True):
        targets = [i for i, m in enumerate(mask) if m and i]
        for place, reward in own_rewards if targets else ():
            target = targets[max(bisect_right(targets, place) - 1, 0)]
            flat_rewards[end - len(mask) + target] += reward
    bounds = torch.tensor([0, *ends], dtype=torch.int32)
    advantages, returns = gae(
        flat_rewards, flat_values, flat_mask, bounds, gamma=gamma, gae_lambda=gae_lambda
    )
    chosen = flat_mask > 0
    variance = float(returns[chosen].var(correction=0)) if chosen.any() else 0.0
    explained = None
    if variance > 0:
        explained = 1 - float((returns - flat_values)[chosen].var(correction=0)) / variance
    if normalize and chosen.any():
        own = advantages[chosen]
        flat = own.min() == own.max()
        advantages[chosen] = 0.0 if flat else (own - own.mean()) / (own.std(correction=0) + epsilon)
    return TokenAdvantages(
        [a.numpy() for a in advantages.split(sizes)], [r.numpy() for r in returns.split(sizes)], explained
    )
