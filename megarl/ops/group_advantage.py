"""Group-relative advantages of ragged groups; definitions in :mod:`megarl.advantages.group`."""

from __future__ import annotations

import torch

from megarl.ops._load import load_native

load_native()


def group_advantage(
    rewards: torch.Tensor,
    cu_groups: torch.Tensor,
    *,
    leave_one_out: bool = False,
    normalize_std: bool = True,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Return advantages [N] of rewards [N] (fp32 or fp64); cu_groups [G + 1] int32 bounds the groups.

    On the host, in float64. A group whose rewards are all equal (one of size 1 included) gets exactly 0. The
    caller checks that rewards are finite (megarl.advantages does). No gradient.

    Raises:
        ValueError: wrong shapes, dtypes, boundaries or a negative epsilon.
    """
    advantages: torch.Tensor = torch.ops.megarl.group_advantage(
        rewards.detach(), cu_groups, leave_one_out, normalize_std, epsilon
    )
    return advantages


@torch.library.register_fake("megarl::group_advantage")
def _(
    rewards: torch.Tensor, cu_groups: torch.Tensor, leave_one_out: bool, normalize_std: bool, epsilon: float
) -> torch.Tensor:
    return torch.empty_like(rewards)
