"""One (data, context) coordinate's share of an optimizer step, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from megarl.batching.context_assignment import ContextAssignment, multiple_of
from megarl.batching.pack import Packer
from megarl.batching.segments import Segments
from megarl.batching.token_values import at_targets, per_sequence
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.records import PackedBatch, TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The R sequences of a coordinate's M microbatches, each once, and the segments to pack.

    Ranks that differ only in their tensor or pipeline coordinate have the same share.
    """

    batch: TrainBatch
    rows: np.ndarray  # [R] int64, ascending: indices of the sequences within the step
    weights: np.ndarray  # [R] float64: weight of each target in the loss
    advantages: np.ndarray | None  # [R] float64: advantage of each target, if known
    segments: Segments  # of ``batch``, in the order of the microbatches
    bounds: np.ndarray  # [M + 1] int64: microbatch m has segments bounds[m] to bounds[m + 1]
    split: np.ndarray  # [M] uint8: 1 if split over context-parallel ranks

    def arrays(self) -> dict[str, np.ndarray | None]:
        """Return all fields by name, for sending."""
        return {
            f"{prefix}{each.name}": getattr(record, each.name)
            for prefix, record in (("", self), ("batch.", self.batch), ("segments.", self.segments))
            for each in fields(record)
            if each.name not in ("batch", "segments")
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Share:
        """Rebuild a share from ``arrays``'s result."""

        def record(kind: Any, prefix: str, **inner: Any) -> Any:
            names = [each.name for each in fields(kind) if each.name not in inner]
            return kind(**{name: arrays.get(prefix + name) for name in names}, **inner)

        batch, segments = record(TrainBatch, "batch."), record(Segments, "segments.")
        share: Share = record(cls, "", batch=batch, segments=segments)
        return share


def make_share(
    batch: TrainBatch,
    parts: list[ContextAssignment],
    weights: np.ndarray,
    advantages: np.ndarray | None,
    layout: ParallelLayout,
    data: int,
    context: int,
) -> Share:
    """Return a coordinate's share of the plan of ``assign_contexts``; weights and advantages are [S]."""
    sizes: list[int] = []
    split: list[bool] = []
    segments: list[Segments] = []
    for part in parts:
        microbatches = part.microbatches(layout, data, context)
        sizes += [len(each) for each in microbatches]
        split += [part.split] * len(microbatches)
        chosen = np.array([i for each in microbatches for i in each], dtype=np.int64)
        number = np.full(len(part.segments) + 1, -1)  # of each segment in the share; last: "none"
        number[chosen] = np.arange(len(chosen)) + sum(map(len, segments))
        of = part.segments
        prefixes = number[of.prefixes[chosen]]
        segments.append(Segments(of.rows[chosen], of.skips[chosen], of.lengths[chosen], prefixes))
    joined = [
        np.concatenate([getattr(each, name.name) for each in segments]) if segments else np.zeros(0, np.int64)
        for name in fields(Segments)
    ]
    rows = np.unique(joined[0])
    joined[0] = np.searchsorted(rows, joined[0])
    return Share(
        batch if len(rows) == len(batch) else batch.select(rows),
        rows,
        weights[rows],
        None if advantages is None else advantages[rows],
        Segments(*joined),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.array(split, dtype=np.uint8),
    )


def pack_share(
    share: Share,
    num_packed_tokens: int,
    layout: ParallelLayout,
    at: RankCoordinates,
    device: torch.device | str,
) -> list[PackedBatch]:
    """Pack the microbatches of the rank at ``at``; num_packed_tokens are those of all ranks' segments."""
    packer = Packer(share.batch, share.segments, advantages=share.advantages, device=device)
    rows, weights = (torch.from_numpy(each).to(device) for each in (share.rows, share.weights))
    stale = share.batch.stale
    batches = []
    for number, split in enumerate(share.split.tolist()):
        indices = list(range(share.bounds[number], share.bounds[number + 1]))
        cp_rank, cp_size = (at.context, layout.context) if split else (0, 1)
        multiple = multiple_of(bool(split), layout)
        packed = packer.pack(indices, pad_to_multiple=multiple, cp_rank=cp_rank, cp_size=cp_size)
        packed.split = bool(split)
        packed.token_share = int(share.segments.lengths[indices].sum()) / max(num_packed_tokens, 1)
        packed.loss_weights = per_sequence(packed, weights)
        if stale is not None:
            packed.stale = at_targets(packed, stale, share.batch.offsets, np.arange(len(share.rows)))
        packed.sequence_ids = rows[packed.sequence_ids] if len(rows) else packed.sequence_ids
        batches.append(packed)
    return batches
