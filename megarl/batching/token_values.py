"""Values of sequences and tokens at the targets of a packed microbatch, and back.

``position_ids`` count a sequence's own tokens in every packing, shared prefixes and context-parallel
slices included, so the value at t belongs to token ``position_ids[t] + 1`` of its sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from megarl.records import PackedBatch


def per_sequence(batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
    """values [S], counted as ``batch.sequence_ids`` do, at each target: [T] float32, elsewhere 0."""
    if not len(values):  # a dummy
        return torch.zeros_like(batch.loss_mask)
    return values.to(batch.loss_mask.dtype)[batch.sequence_ids] * batch.loss_mask


def at_targets(batch: PackedBatch, values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Ragged values of the tokens of sequences ``rows`` at each target: [T] float32, elsewhere 0.

    Args:
        batch: a microbatch of some of these sequences.
        values: [N], aligned with the token ids of the sequences, end to end.
        offsets: [R + 1], of ``values``.
        rows: [R] ascending, which of ``batch.sequence_ids`` they are.
    """
    at, places = _places(batch, offsets, rows)
    field = torch.zeros_like(batch.loss_mask)
    field[at] = torch.from_numpy(values).to(field.device)[places].to(field.dtype)
    return field


def add_targets(
    batch: PackedBatch, field: torch.Tensor, into: np.ndarray, offsets: np.ndarray, rows: np.ndarray
) -> None:
    """The reverse: set ``into`` [N] to a field's values [T] at the targets of ``batch``."""
    at, places = _places(batch, offsets, rows)
    into[places.cpu().numpy()] = field.detach()[at].float().cpu().numpy()


def _places(batch: PackedBatch, offsets: np.ndarray, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Where targets lie in the microbatch, and their tokens in the ragged values."""
    device = batch.loss_mask.device
    starts, numbers = (torch.from_numpy(each).to(device) for each in (offsets, rows))
    at = batch.loss_mask.nonzero().flatten()
    sequences = torch.searchsorted(numbers, batch.sequence_ids[at])
    return at, starts[sequences] + batch.position_ids[at] + 1
