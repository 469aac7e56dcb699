"""Trainer's values for the tokens of a few samples: for samples/step_N.jsonl and the report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megarl.cluster.collectives import gather_to_first_rank
from megarl.losses.base import LossTokens
from megarl.records import PackedBatch, TrainBatch


@dataclass(frozen=True, slots=True)
class TracedTokens:
    """The trainer's view of the N response tokens of one sample; NaN where it has no target."""

    logprobs: np.ndarray  # [N] float64, of the sampler's distribution, with the weights that drew the tokens
    entropy: np.ndarray  # [N] float64, nats
    advantages: np.ndarray | None = None  # [N] float64, if they differ between the sample's tokens


@dataclass(slots=True)
class TokenTrace:
    """Keeps logprob and entropy of the sequences ``rows`` of a mini-batch, from one pass over it.

    Every rank calls every method. The pass calls :meth:`read` for each microbatch; after :meth:`close`, when
    the weights change, further passes are not read.
    """

    rows: np.ndarray  # [R] int64: indices into the mini-batch, equal on every rank
    _parts: list[np.ndarray] = field(default_factory=list)
    _is_closed: bool = False

    def read(self, batch: PackedBatch, tokens: LossTokens) -> None:
        """Keep the values of the chosen sequences' targets in one microbatch (on the last stage)."""
        if self._is_closed or not len(self.rows):
            return
        assert tokens.rows is not None
        chosen = torch.from_numpy(self.rows).to(tokens.sequence_ids.device)
        at = torch.isin(tokens.sequence_ids, chosen).nonzero().flatten()
        positions = batch.position_ids[tokens.rows[at]] + 1  # of the predicted token
        columns = (
            tokens.sequence_ids[at],
            positions,
            tokens.logprobs.detach()[at],
            tokens.entropy.detach()[at],
        )
        self._parts.append(torch.stack([column.double() for column in columns]).cpu().numpy())

    def close(self) -> None:
        """Read no further pass."""
        self._is_closed = True

    def gather(
        self, batch: TrainBatch, advantages: np.ndarray | None, *, has_results: bool
    ) -> dict[int, TracedTokens]:
        """Return the values by row, on rank 0; empty elsewhere. Rows that no pass computed are absent.

        Args:
            batch: the mini-batch (rank 0's).
            advantages: [S] or [T] of it (rank 0's).
            has_results: whether this rank's microbatches are its own, not a replica's.
        """
        mine = np.concatenate([np.zeros((4, 0)), *self._parts], axis=1) if has_results else np.zeros((4, 0))
        parts = gather_to_first_rank(mine)
        if not parts:
            return {}
        rows, positions, logprobs, entropy = np.concatenate(parts, axis=1)
        found: dict[int, TracedTokens] = {}
        for row in np.unique(rows).astype(np.int64).tolist():
            start = int(batch.prompt_lengths[row])
            at = rows == row
            where = positions[at].astype(np.int64) - start
            traced = TracedTokens(*np.full((2, int(batch.lengths[row]) - start), np.nan))
            traced.logprobs[where], traced.entropy[where] = logprobs[at], entropy[at]
            found[row] = traced
            if advantages is not None and len(advantages) == batch.num_tokens != len(batch):
                span = slice(int(batch.offsets[row]) + start, int(batch.offsets[row + 1]))
                by_token = np.where(np.isnan(traced.logprobs), np.nan, advantages[span])
                found[row] = TracedTokens(traced.logprobs, traced.entropy, by_token)
        return found
