"""What is packed: sequences of a batch, or pieces of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megarl.records import TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """N pieces of a batch's sequences, each packed as a sequence of its own; every field [N] int64.

    A segment with a prefix attends to it and goes on from its last position.
    """

    rows: np.ndarray  # the sequence of the batch that it is part of
    skips: np.ndarray  # how many tokens of that sequence come before it
    lengths: np.ndarray
    prefixes: np.ndarray  # the number of the segment that comes first, -1: none

    @classmethod
    def whole(cls, batch: TrainBatch, rows: np.ndarray | list[int] | None = None) -> Segments:
        """Sequences ``rows`` (default: all), undivided."""
        chosen = np.arange(len(batch)) if rows is None else np.asarray(rows, dtype=np.int64)
        return cls(chosen, np.zeros_like(chosen), batch.lengths[chosen], np.full_like(chosen, -1))

    def __len__(self) -> int:
        return len(self.rows)

    def starts(self, batch: TrainBatch) -> np.ndarray:
        """[N] int64: where each begins in the batch's tokens."""
        found: np.ndarray = batch.offsets[self.rows] + self.skips
        return found
