"""From rewards to advantages, as algorithm.* says; docs/algorithms.md has the order and the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from megarl.advantages.group import group_advantages
from megarl.advantages.shaping import add_kl_to_go, clip_advantages, overlong_penalty, standardize
from megarl.algorithms.parts import Part
from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.records import Group


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of all parts end to end."""

    offsets: np.ndarray  # [S + 1]
    targets: np.ndarray  # [T] bool: in the loss
    kl: np.ndarray  # [T] float64: k1 to the reference of targets

    @classmethod
    def of(cls, parts: list[Part], kl: np.ndarray) -> _Tokens:
        lengths = [part.batch.lengths for part in parts]
        offsets = np.concatenate([[0], np.concatenate(lengths).cumsum()])
        return cls(offsets, np.concatenate([part.targets() for part in parts]), kl)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[S]: values [T] of targets, added up for each sequence."""
        return np.array([values[i:j].sum() for i, j in pairwise(self.offsets.tolist())])


def give_advantages(
    groups: list[Group],
    parts: list[Part],
    algorithm: GrpoAlgorithmConfig,
    *,
    max_new_tokens: int,
    kl: np.ndarray | None = None,
) -> dict[str, float]:
    """Set the ``advantages`` of every part; returns what is logged about them.

    Sets the ``advantage`` of every sample of the groups too (the mean over its tokens, where they differ).

    Args:
        groups: graded; every sample counts for its group's baseline.
        parts: with those of these samples that are trained on.
        algorithm: which.
        max_new_tokens: where the overlong penalty is whole.
        kl: k1 to the reference of every target, all parts' tokens [T] end to end, with kl_reward_coef.
    """
    samples = [sample for group in groups for sample in group.samples]
    bounds = np.array([0, *accumulate(len(group.samples) for group in groups)])
    number_of = {id(sample): number for number, sample in enumerate(samples)}
    trained = np.array([number_of[id(s)] for part in parts for s in part.samples], dtype=np.int64)
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.num_targets for part in parts)])
    tokens = None if kl is None else _Tokens.of(parts, kl)
    coef, by_token = algorithm.kl_reward_coef, algorithm.kl_reward_level == "token"

    values: dict[str, float] = {}
    rewards = np.array([float(s.reward or 0.0) for s in samples])
    if algorithm.overlong_buffer is not None:
        lengths = np.array([len(s.response_ids) for s in samples])
        rewards += algorithm.overlong_penalty * overlong_penalty(
            lengths, max_tokens=max_new_tokens, buffer=algorithm.overlong_buffer
        )
    if tokens is not None:
        sums = tokens.sums(tokens.kl)
        values["kl_reward"] = float(sums.sum()) / max(int(counts.sum()), 1)
        if not by_token:
            rewards[trained] -= coef * sums
    if algorithm.overlong_buffer is not None or (tokens is not None and not by_token):
        values["shaped_reward_mean"] = float(rewards.mean())

    of_samples = group_advantages(
        rewards, bounds, baseline=algorithm.baseline, normalize_std=algorithm.normalize_std
    )
    advantages, per_token = of_samples[trained], tokens is not None and by_token
    if tokens is not None and by_token:
        advantages, counts = add_kl_to_go(advantages, tokens.kl, tokens.offsets, coef), tokens.targets
    if algorithm.normalize_batch:
        advantages = standardize(advantages, counts)
    if algorithm.advantage_clip is not None:
        advantages, values["advantage_clipped_fraction"] = clip_advantages(
            advantages, counts, algorithm.advantage_clip
        )
    otherwise = of_samples[trained]
    if tokens is not None and by_token:
        of_samples[trained] = _means(advantages, tokens, otherwise)
    else:
        of_samples[trained] = np.where(counts > 0, advantages, otherwise)
    for sample, advantage in zip(samples, of_samples.tolist(), strict=True):
        sample.advantage = advantage
    _set(parts, advantages, per_token=per_token)
    return values


def _means(advantages: np.ndarray, tokens: _Tokens, otherwise: np.ndarray) -> np.ndarray:
    """[S]: the mean over each sequence's targets; ``otherwise`` where it has none."""
    means = otherwise.copy()
    for row, (start, end) in enumerate(pairwise(tokens.offsets.tolist())):
        own = advantages[start:end][tokens.targets[start:end]]
        if len(own):
            means[row] = own[0] if (own == own[0]).all() else own.mean()
    return means


def _set(parts: list[Part], advantages: np.ndarray, *, per_token: bool) -> None:
    start = 0
    for part in parts:
        end = start + (part.batch.num_tokens if per_token else len(part.samples))
        part.advantages = advantages[start:end]
        start = end
