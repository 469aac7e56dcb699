"""The loss interface; weights keep denominators independent of the parallel layout.

A loss is a sum over tokens of ``weight * value``. The weights carry the *global* denominators (over all ranks
and microbatches of the optimizer step), so sums over microbatches, context- and data-parallel ranks need no
further scaling, whatever the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist

from megarl.losses.all_reduce import all_reduce_sum
from megarl.ops.segment_reduce import segment_reduce

Aggregation = Literal["token", "sequence", "fixed_length"]


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The rows of one microbatch that have a loss: N tokens, each field [N]."""

    logprobs: torch.Tensor  # trainer's, with gradient
    entropy: torch.Tensor
    weights: torch.Tensor  # share of each token in the mean
    labels: torch.Tensor  # int64
    sequence_ids: torch.Tensor  # int64
    advantages: torch.Tensor | None
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    rollout_logprobs: torch.Tensor | None
    stale: torch.Tensor | None = None  # 1 if older weights than the trainer's drew the token
    nll_weights: torch.Tensor | None = None  # share of each token in the mean of a likelihood term
    # For losses with sequence means: int64, ascending index of the token's sequence among the microbatch's
    # num_slots. The ranks of cp_group hold other tokens of the same sequences in the same slots (N may be 0).
    slots: torch.Tensor | None = None
    num_slots: int = 0
    slot_ids: torch.Tensor | None = None  # [num_slots] int64: sequence_ids of the slots, -1 for a dummy's
    cp_group: dist.ProcessGroup | None = None  # None: no rank shares these sequences
    rows: torch.Tensor | None = None  # int64, ascending: positions in the microbatch

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` [N] over every slot's tokens on all ranks: [num_slots] float64.

        With gradient; summed in a fixed order, so a run is repeatable bit for bit. All ranks of cp_group call
        it.
        """
        assert self.slots is not None
        slot_numbers = torch.arange(self.num_slots + 1, device=self.slots.device)
        bounds = torch.searchsorted(self.slots, slot_numbers).to(torch.int32)
        sums = segment_reduce(values.double(), bounds)
        return sums if self.cp_group is None else all_reduce_sum(sums, self.cp_group)

    def sequence_means(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of ``values`` [N] over each token's sequence, [N] in their dtype, with gradient."""
        assert self.slots is not None
        counts = self.sequence_sums(torch.ones_like(values, requires_grad=False))
        means = self.sequence_sums(values) / counts.clamp(min=1)
        return means[self.slots].to(values.dtype)

    def counted(self) -> LossTokens:
        """Select the tokens with nonzero weight; values of the others are not read, NaN included."""
        rows = self.weights.nonzero().flatten()
        if len(rows) == len(self.weights):
            return self
        per_token = {
            name: value[rows]
            for name in self.__dataclass_fields__
            if name not in ("num_slots", "slot_ids", "cp_group")
            and (value := getattr(self, name)) is not None
        }
        return replace(self, **per_token)


@dataclass(slots=True)
class LossResult:
    """A microbatch's loss (its share of the global mean) and its metrics.

    ``sums`` are weighted by ``LossTokens.weights``; they are added over microbatches and ranks and divided by
    the sum of ``weight``, which is 1 up to rounding (so the mean of a constant is that constant).
    ``token_sums`` are plain sums over tokens, divided by the sum of ``tokens``. ``maxima`` are combined by
    maximum. Values are scalars without gradient.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    token_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """A loss as the trainer calls it, once per microbatch."""

    def __call__(self, tokens: LossTokens) -> LossResult:
        """Return loss and sums of these tokens."""
        ...


def token_weights(
    num_targets: np.ndarray, aggregation: Aggregation, fixed_length: int | None = None
) -> np.ndarray:
    """Return the weight of each target token per sequence, [S] float64, over the whole optimizer step.

    "token": 1 / T; "sequence": 1 / (S * the sequence's number of targets); "fixed_length": 1 / (S *
    fixed_length) (Dr. GRPO, arXiv:2503.20783). T counts all targets and S all sequences with at least one. A
    sequence without targets has weight 0: set its count to 0 to remove it from a loss.

    Args:
        num_targets: [S], of every sequence of the step.
        aggregation: kind of mean.
        fixed_length: for "fixed_length".
    """
    counts = np.asarray(num_targets, dtype=np.int64)
    total, num_sequences = counts.sum(), np.count_nonzero(counts)
    each = np.ones(len(counts))
    if aggregation == "token":
        each *= total
    elif aggregation == "sequence":
        each = num_sequences * counts.astype(np.float64)
    else:
        assert fixed_length is not None
        each *= num_sequences * fixed_length
    weights = np.zeros(len(counts))
    np.divide(1.0, each, out=weights, where=counts > 0)
    return weights
