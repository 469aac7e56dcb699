"""From rewards to advantages, as algorithm.* says; docs/algorithms.md has the order and the formulas."""

from __future__ import annotations

import numpy as np

from megarl.advantages.group import group_advantages
from megarl.advantages.shaping import Array, add_kl_to_go, clip_advantages, overlong_penalty, standardize
from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.records import Group, Sample, Sequence


def give_advantages(
    groups: list[Group],
    samples: list[Sample],
    sequences: list[Sequence],
    algorithm: GrpoAlgorithmConfig,
    *,
    max_new_tokens: int,
    kls: list[Array] | None,
) -> tuple[list[Array], dict[str, float]]:
    """Advantages [n] aligned with the token ids of ``sequences``, and what is logged about them.

    Sets the ``advantage`` of every sample of the groups (the mean over its tokens, where they differ).

    Args:
        groups: graded; every sample counts for its group's baseline.
        samples: those that are trained on, in the order of ``sequences``.
        sequences: their targets get an advantage.
        algorithm: which.
        max_new_tokens: where the overlong penalty is whole.
        kls: [n] per sequence, k1 to the reference, with kl_reward_coef.
    """
    masks = [np.array(s.loss_mask, dtype=bool) for s in sequences]
    for mask in masks:
        mask[0] = False
    kl_of = [] if kls is None else [kl[mask] for kl, mask in zip(kls, masks, strict=True)]
    coef, by_token = algorithm.kl_reward_coef, algorithm.kl_reward_level == "token"
    shaped = {id(s): _shaped(s, algorithm, max_new_tokens) for group in groups for s in group.samples}
    values: dict[str, float] = {}
    if kls is not None:
        count = sum(len(kl) for kl in kl_of)
        values["kl_reward"] = sum(float(kl.sum()) for kl in kl_of) / max(count, 1)
        if not by_token:
            for sample, kl in zip(samples, kl_of, strict=True):
                shaped[id(sample)] -= coef * float(kl.sum())
    if algorithm.overlong_buffer is not None or (kls is not None and not by_token):
        values["shaped_reward_mean"] = sum(shaped.values()) / len(shaped)
    _by_group(groups, shaped, algorithm)
    scalars = [float(s.advantage or 0.0) for s in samples]
    tokens = [np.full(int(mask.sum()), a) for a, mask in zip(scalars, masks, strict=True)]
    if kls is not None and by_token:
        tokens = add_kl_to_go(scalars, kl_of, coef)
    if algorithm.normalize_batch:
        tokens = standardize(tokens)
    if algorithm.advantage_clip is not None:
        tokens, values["advantage_clipped_fraction"] = clip_advantages(tokens, algorithm.advantage_clip)
    for sample, own in zip(samples, tokens, strict=True):
        if len(own):
            sample.advantage = float(own[0]) if (own == own[0]).all() else float(own.mean())
    return [_spread(own, mask) for own, mask in zip(tokens, masks, strict=True)], values


def _shaped(sample: Sample, algorithm: GrpoAlgorithmConfig, max_new_tokens: int) -> float:
    reward = float(sample.reward or 0.0)
    if algorithm.overlong_buffer is None:
        return reward
    return reward + algorithm.overlong_penalty * overlong_penalty(
        len(sample.response_ids), max_tokens=max_new_tokens, buffer=algorithm.overlong_buffer
    )


def _by_group(groups: list[Group], shaped: dict[int, float], algorithm: GrpoAlgorithmConfig) -> None:
    advantages = group_advantages(
        [[shaped[id(s)] for s in group.samples] for group in groups],
        baseline=algorithm.baseline,
        normalize_std=algorithm.normalize_std,
    )
    for group, values in zip(groups, advantages, strict=True):
        for sample, advantage in zip(group.samples, values, strict=True):
            sample.advantage = advantage


def _spread(values: Array, mask: np.ndarray) -> Array:
    whole = np.zeros(len(mask))
    whole[mask] = values
    return whole
