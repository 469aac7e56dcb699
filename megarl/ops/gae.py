"""Generalised advantage estimation over packed sequences (Schulman et al. 2015, arXiv:1506.02438)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megarl.ops._load import load_native

load_native()


class AdvantagesAndReturns(NamedTuple):
    """Per token, 0 where the mask is 0."""

    advantages: torch.Tensor  # [T]
    returns: torch.Tensor  # [T], advantages + values: the value head's targets


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> AdvantagesAndReturns:
    """Compute ``delta_t = r_t + gamma V_t' - V_t``, ``A_t = delta_t + gamma lambda A_t'``, t' the next token.

    "Next" is the next position with mask in the same sequence, so prompt, tool output and padding cause
    neither a discount nor a bootstrap from an untrained value; after the last one both V' and A' are 0 (a
    truncated episode is not bootstrapped).

    rewards and values [T] in one of fp32, fp64 (computed in fp64); mask [T] float32; cu_seqlens [S + 1]
    int32. On the host. No gradient: advantages are constants of the loss.

    Raises:
        ValueError: wrong shapes, dtypes, boundaries, or gamma and gae_lambda outside [0, 1].
    """
    detached = (rewards.detach(), values.detach())
    return AdvantagesAndReturns(*torch.ops.megarl.gae(*detached, mask, cu_seqlens, gamma, gae_lambda))


@torch.library.register_fake("megarl::gae")
def _(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> AdvantagesAndReturns:
    return AdvantagesAndReturns(torch.empty_like(rewards), torch.empty_like(rewards))
