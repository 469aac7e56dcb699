"""Inputs of losses over the whole vocabulary: hidden states and the head (distillation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Head:
    """This rank's rows of the language-model head, without padding: [V_local, H], from ``vocab_start`` on.

    The ranks of ``group`` hold the rest of the vocabulary; None: the head is whole.
    """

    weight: torch.Tensor
    vocab_start: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class HiddenTokens:
    """Hidden states [N, H] of a microbatch's targets, in the order of ``rows``, and the head."""

    rows: torch.Tensor  # [N] int64, rows of the microbatch
    hidden: torch.Tensor  # [N, H]
    head: Head
