"""Losses and advantages as a user would write them; tests reference them by dotted path."""

from __future__ import annotations

import time

import numpy as np
import torch

from megarl.losses.base import LossTokens
from megarl.records import Group

SLEPT: list[float] = []


def clipped(tokens: LossTokens) -> torch.Tensor:
    """PPO's clipped ratio, 0.2 on both sides: the built-in objective's default."""
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    return torch.maximum(-tokens.advantages * ratio, -tokens.advantages * ratio.clamp(0.8, 1.2))


def sequence_clipped(tokens: LossTokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GSPO (arXiv:2507.18071), and how many tokens of its sequences were clipped."""
    ratio = tokens.sequence_means(tokens.logprobs - tokens.old_logprobs).exp()
    plain, bounded = -tokens.advantages * ratio, -tokens.advantages * ratio.clamp(0.8, 1.2)
    return torch.maximum(plain, bounded), {"gspo_clipped": (bounded > plain).float()}


def mean_loss(tokens: LossTokens) -> torch.Tensor:
    """A mistake: MegaRL takes the mean itself."""
    return -(tokens.advantages * tokens.logprobs).mean()


def unlogged(tokens: LossTokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A mistake: what is logged is per token too."""
    return -tokens.advantages * tokens.logprobs, {"best": tokens.logprobs.max()}


def centred(group: Group, rewards: np.ndarray) -> np.ndarray:
    """The built-in advantage: mean and sample deviation of the group."""
    if rewards.min() == rewards.max():
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def short_first(group: Group, rewards: np.ndarray) -> np.ndarray:
    """Against the group's mean; of the right answers the shortest counts double."""
    advantages = rewards - rewards.mean()
    lengths = np.array([len(sample.response_ids) for sample in group.samples])
    right = rewards == rewards.max()
    advantages[right & (lengths == lengths[right].min())] *= 2
    return advantages


def one_number(group: Group, rewards: np.ndarray) -> np.ndarray:
    """A mistake: one number for the whole group."""
    return rewards.mean()


def infinite(group: Group, rewards: np.ndarray) -> np.ndarray:
    """A mistake: a group without deviation divides by 0."""
    with np.errstate(all="ignore"):
        return rewards / (rewards - rewards)


not_a_function = 3


def slow_on_rank_1(tokens: LossTokens) -> torch.Tensor:
    """The clipped ratio, on rank 1 after a sleep of 2 s per microbatch."""
    if torch.distributed.get_rank() == 1:
        time.sleep(2)
        SLEPT.append(2.0)
    return clipped(tokens)
