"""Helpers of the vocabulary ops: gather row statistics over shards, and check inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

LOGITS_CAUSE = ": its logits hold NaN or inf, or give the target no probability"


class NumericsError(FloatingPointError):
    """A non-finite value found by check_numerics; ``row`` is its row among the op's rows."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def group_size(tp_group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks that share the vocabulary."""
    return 1 if tp_group is None else tp_group.size()


def gather_shards(
    stats: torch.Tensor, tp_group: dist.ProcessGroup | None, extent: tuple[int, int]
) -> tuple[torch.Tensor, list[tuple[int, int]] | None]:
    """Gather every rank's row statistics [P, R, K] in one all_gather, differentiable in this rank's own.

    extent is this shard's (vocab_start, columns). Every rank's extent is sent along as one more row, and
    returned where reading it is free: on CPUs. Accelerators get None.
    """
    if group_size(tp_group) == 1:
        return stats.unsqueeze(0), [extent] if stats.device.type == "cpu" else None
    assert tp_group is not None
    # float32 represents whole numbers up to 2^24, well above any vocabulary
    last = stats.new_zeros(1, stats.shape[1])
    last[0, 0], last[0, 1] = extent
    own = torch.cat([stats.detach(), last])
    gathered = own.new_empty(tp_group.size(), *own.shape)
    dist.all_gather(list(gathered.unbind(0)), own, group=tp_group)
    shards = list(gathered[:, :-1].unbind(0))
    shards[dist.get_rank(tp_group)] = stats
    extents = None
    if stats.device.type == "cpu":
        extents = [(int(start), int(columns)) for start, columns in gathered[:, -1, :2].tolist()]
    return torch.stack(shards), extents


def check_extents(op: str, extents: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the range of global ids that the shards cover; ValueError for gaps or overlaps."""
    ordered = sorted(extents)
    for (start, columns), (following, _) in pairwise(ordered):
        if start + columns != following:
            raise ValueError(
                f"megarl::{op}: vocab_start: shards do not tile the vocabulary: one covers "
                f"[{start}, {start + columns}), the next starts at {following}"
            )
    return ordered[0][0], ordered[-1][0] + ordered[-1][1]


def check_targets(op: str, targets: torch.Tensor, low: int, high: int) -> None:
    """Raise ValueError for a target outside [low, high)."""
    if targets.numel() == 0:
        return
    least, greatest = (int(bound) for bound in torch.aminmax(targets))
    if least < low or greatest >= high:
        row = int(((targets < low) | (targets >= high)).nonzero()[0, 0])
        raise ValueError(
            f"megarl::{op}: targets[{row}] = {int(targets[row])} is outside the vocabulary [{low}, {high})"
        )


def check_finite(op: str, result: NamedTuple, row_index: torch.Tensor | None = None, cause: str = "") -> None:
    """Raise NumericsError naming the first row and field that is NaN or infinite."""
    for name, values in result._asdict().items():
        bad = (~torch.isfinite(values.detach())).nonzero()
        if bad.numel():
            position = int(bad[0, 0])
            row = position if row_index is None else int(row_index[position])
            raise NumericsError(
                f"megarl::{op}: {name} of row {row} is {values[position].item()} "
                f"({bad.shape[0]} such rows){cause}",
                row,
            )


def temperature_tensor(temperature: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert a temperature to the ops' form: float32, [1] or [R], on the logits' device."""
    if isinstance(temperature, torch.Tensor):
        return temperature.to(torch.float32).reshape(-1)
    return torch.full((1,), temperature, dtype=torch.float32, device=device)


def zero_other_rows(matrix: torch.Tensor, row_index: torch.Tensor | None) -> None:
    """Set the rows that are not in row_index to 0, in place."""
    if row_index is not None:
        other = torch.ones(matrix.shape[0], dtype=torch.bool, device=matrix.device)
        other[row_index] = False
        matrix.masked_fill_(other.unsqueeze(1), 0.0)
