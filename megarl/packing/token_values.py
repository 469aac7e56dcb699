"""Values per token between sequences (aligned with their token ids) and microbatches (aligned with labels).

``position_ids`` count a sequence's own tokens in every packing, shared prefixes and context-parallel
slices included, so the value at row t belongs to token ``position_ids[t] + 1`` of its sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from megarl.records import PackedBatch

Array = npt.NDArray[np.float64]


def put(values: Sequence[Array], batch: PackedBatch) -> torch.Tensor:
    """values [S] of [n], aligned with the token ids of the step's sequences, to a field [T] float32.

    0 where nothing is learned.
    """
    rows = batch.loss_mask.nonzero().flatten()
    field = torch.zeros_like(batch.loss_mask, dtype=torch.float32)
    if not len(rows):
        return field
    here, slots = batch.sequence_ids[rows].unique(return_inverse=True)
    own = [values[i] for i in here.tolist()]
    starts = torch.tensor([0, *accumulate(len(v) for v in own[:-1])], device=field.device)
    flat = torch.from_numpy(np.concatenate(own)).to(field.device)
    field[rows] = flat[starts[slots] + batch.position_ids[rows] + 1].float()
    return field


@dataclass(frozen=True, slots=True)
class TokenValues:
    """Values of the targets of some sequences' tokens, [N] each; crosses ranks as it is."""

    sequence_ids: npt.NDArray[np.int64]
    token_indices: npt.NDArray[np.int64]
    values: Array


def take(values: torch.Tensor, batch: PackedBatch) -> TokenValues:
    """The values [T] of one microbatch's field at its targets."""
    rows = batch.loss_mask.nonzero().flatten()
    return TokenValues(
        batch.sequence_ids[rows].cpu().numpy(),
        batch.position_ids[rows].cpu().numpy() + 1,
        values.detach()[rows].double().cpu().numpy(),
    )


def assemble(parts: Iterable[TokenValues], lengths: Sequence[int]) -> list[Array]:
    """Parts that cover every target once to one [n] array per sequence, 0 where there is no target."""
    starts = np.cumsum([0, *lengths[:-1]])
    flat = np.zeros(sum(lengths))
    for part in parts:
        flat[starts[part.sequence_ids] + part.token_indices] = part.values
    return np.split(flat, starts[1:])
