"""Segments: sequences of a batch, or parts of them, that are packed as one sequence each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megarl.records import TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """N parts of a batch's sequences, each packed as a sequence; every field [N] int64.

    A segment with a prefix attends to it and continues from its last position.
    """

    rows: np.ndarray  # the sequence of the batch it is part of
    skips: np.ndarray  # tokens of that sequence before it
    lengths: np.ndarray
    prefixes: np.ndarray  # index of its prefix segment, -1: none

    @classmethod
    def whole(cls, batch: TrainBatch, rows: np.ndarray | list[int] | None = None) -> Segments:
        """Return sequences ``rows`` (default: all) as one segment each."""
        chosen = np.arange(len(batch)) if rows is None else np.asarray(rows, dtype=np.int64)
        return cls(chosen, np.zeros_like(chosen), batch.lengths[chosen], np.full_like(chosen, -1))

    def __len__(self) -> int:
        return len(self.rows)

    def starts(self, batch: TrainBatch) -> np.ndarray:
        """Return each segment's offset in the batch's tokens, [N] int64."""
        found: np.ndarray = batch.offsets[self.rows] + self.skips
        return found
