"""Move values between sequences or tokens and the targets of a packed microbatch.

``position_ids`` count a sequence's own tokens in every packing, shared prefixes and context-parallel slices
included, so the value at t belongs to token ``position_ids[t] + 1`` of its sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from megarl.records import PackedBatch


def per_sequence(batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
    """Return values [S], indexed by ``batch.sequence_ids``, at each target: [T] float32, 0 elsewhere."""
    if not len(values):  # a dummy microbatch
        return torch.zeros_like(batch.loss_mask)
    return values.to(batch.loss_mask.dtype)[batch.sequence_ids] * batch.loss_mask


def at_targets(batch: PackedBatch, values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Return ragged token values of sequences ``rows`` at each target: [T] float32, 0 elsewhere.

    Args:
        batch: a microbatch of some of these sequences.
        values: [N], aligned with the token ids of the sequences, end to end.
        offsets: [R + 1], of ``values``.
        rows: [R] ascending, their ``batch.sequence_ids``.
    """
    at, tokens = _target_positions(batch, offsets, rows)
    field = torch.zeros_like(batch.loss_mask)
    field[at] = torch.from_numpy(values).to(field.device)[tokens].to(field.dtype)
    return field


def add_targets(
    batch: PackedBatch, field: torch.Tensor, into: np.ndarray, offsets: np.ndarray, rows: np.ndarray
) -> None:
    """Invert :func:`at_targets`: set ``into`` [N] to a field's values [T] at the targets of ``batch``."""
    at, tokens = _target_positions(batch, offsets, rows)
    into[tokens.cpu().numpy()] = field.detach()[at].float().cpu().numpy()


def _target_positions(
    batch: PackedBatch, offsets: np.ndarray, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets' positions in the microbatch and their tokens' indices in the ragged values."""
    device = batch.loss_mask.device
    starts, numbers = (torch.from_numpy(each).to(device) for each in (offsets, rows))
    at = batch.loss_mask.nonzero().flatten()
    sequences = torch.searchsorted(numbers, batch.sequence_ids[at])
    return at, starts[sequences] + batch.position_ids[at] + 1
