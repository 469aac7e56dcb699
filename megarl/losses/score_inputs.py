"""Inputs of losses over scores: one number per token from a score head (reward models and critics)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megarl.losses.base import LossResult


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """A microbatch's scores, N rows: the targets' (critics) or each sequence's last token's (reward models).

    A target's score is computed at the token before it: the expected return before it is drawn.
    """

    scores: torch.Tensor  # [N] float32, with gradient
    weights: torch.Tensor  # [N] share of each token in the mean; unused for last tokens
    old_values: torch.Tensor | None  # [N] the critic's, before the step
    returns: torch.Tensor | None  # [N]
    # As in LossTokens.
    slots: torch.Tensor
    num_slots: int
    slot_ids: torch.Tensor
    cp_group: dist.ProcessGroup | None
    rows: torch.Tensor | None = None


class ScoreLoss(Protocol):
    """A loss as the trainer calls it, once per microbatch."""

    def __call__(self, tokens: ScoreTokens) -> LossResult:
        """Return loss and sums of these scores."""
        ...
