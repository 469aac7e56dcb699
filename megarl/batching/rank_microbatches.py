"""Build every rank's microbatches from a batch of sequences; scatter and gather per-token values.

Rank 0 has the batch of a rollout. It plans for all ranks, from lengths and prompts, and sends each
(data, context) coordinate of the layout only its own :class:`~megarl.batching.rank_share.Share`. Data that
every rank reads itself takes the same path without the sending.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megarl.batching.context_assignment import ContextAssignment, MicrobatchLimits, assign_contexts
from megarl.batching.microbatch_plan import CostModel
from megarl.batching.rank_share import Share, make_share, pack_share
from megarl.batching.token_values import add_targets, at_targets, per_sequence
from megarl.cluster.collectives import broadcast_arrays, from_first_rank, gather, receive_arrays, send_arrays
from megarl.config.packing import PackingConfig
from megarl.layout import ParallelLayout
from megarl.losses.base import Aggregation, token_weights
from megarl.records import PackedBatch, TrainBatch, take_rows


@dataclass(slots=True)
class PackedStep:
    """One optimizer step: this rank's microbatches, and the whole step's plan.

    ``batch`` is the whole step's, on rank 0 and on every rank that read the data itself; None elsewhere.
    """

    batches: list[PackedBatch]
    batch: TrainBatch | None
    layout: ParallelLayout
    rank: int
    rows: np.ndarray  # [R] int64, ascending: the step's sequences in this rank's microbatches
    offsets: np.ndarray  # [R + 1] int64: their token offsets, end to end
    num_tokens: int  # of the packed sequences, over all ranks
    num_computed_tokens: int  # over all ranks, padding included, a shared prompt counted once
    split_counts: dict[str, float] = field(default_factory=dict)
    """With parallel.context_split_from: num_split_sequences and num_whole_sequences."""
    shares: list[np.ndarray] = field(default_factory=list)
    """On rank 0: ``rows`` of every coordinate, context fastest."""
    bytes_sent: int = 0
    """Bytes of the arrays that rank 0 sent to other coordinates."""


class BatchMaker:
    """Build the microbatches of one rank under one layout. Every rank calls every method."""

    def __init__(
        self,
        layout: ParallelLayout,
        rank: int,
        device: torch.device | str,
        packing: PackingConfig,
        costs: CostModel,
        split_from: int | None = None,
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        self.packing, self.costs, self.split_from = packing, costs, split_from

    def prepare(
        self,
        batch: TrainBatch | None,
        aggregation: Aggregation,
        *,
        group_size: int = 1,
        fixed_length: int | None = None,
        only: np.ndarray | list[int] | None = None,
        advantages: np.ndarray | None = None,
        scatter: bool = False,
    ) -> PackedStep:
        """Plan and pack one optimizer step.

        Args:
            batch: on every rank; with ``scatter`` on rank 0 only, which plans (others pass anything).
            aggregation: how token_weights weighs targets; unpacked sequences count in its denominators.
            group_size: number of consecutive sequences that share a microbatch, in order (pairs). Prompts
                are not shared then, nor with packing.share_prefix off.
            fixed_length: for that aggregation.
            only: the sequences to pack, ascending (default: all).
            advantages: [S], of all targets of a sequence, if known already.
            scatter: rank 0 sends every rank its share.

        Raises:
            UserError: on every rank, if a sequence or group is longer than the budget.
        """
        parts: list[ContextAssignment] = []

        def plan() -> dict[str, Any]:
            assert batch is not None
            rows = np.arange(len(batch)) if only is None else np.asarray(only, dtype=np.int64)
            limits = MicrobatchLimits(
                max_tokens=self.packing.max_tokens_per_microbatch,
                group_size=group_size,
                share_prefixes=self.packing.share_prefix == "auto",
                split_from=self.split_from,
            )
            parts.extend(assign_contexts(batch, rows, limits, self.costs, self.layout))
            return _plan_facts(batch, rows, parts, counts=self.split_from is not None)

        def share(data: int, context: int) -> Share:
            assert batch is not None
            return make_share(batch, parts, weights, advantages, self.layout, data, context)

        facts = from_first_rank(plan) if scatter else plan()
        packed_tokens = facts.pop("packed_tokens")
        at, bytes_sent, shares = self.layout.coordinates(self.rank), 0, []
        weights = np.zeros(0)
        if batch is not None and (self.rank == 0 or not scatter):
            weights = token_weights(batch.num_targets(), aggregation, fixed_length)
        if self.rank == 0:
            shares = [rows_of(parts, self.layout, *each) for each in coordinates(self.layout)]
        if scatter:
            arrays, bytes_sent = scatter_arrays(self.layout, self.rank, lambda *to: share(*to).arrays())
            mine = Share.from_arrays(arrays)
        else:
            mine = share(at.data, at.context)
            self._assert_same_split(mine)
        return PackedStep(
            pack_share(mine, packed_tokens, self.layout, at, self.device),
            batch if self.rank == 0 or not scatter else None,
            self.layout,
            self.rank,
            mine.rows,
            mine.batch.offsets,
            **facts,
            shares=shares,
            bytes_sent=bytes_sent,
        )

    def _assert_same_split(self, share: Share) -> None:
        """Assert that context-parallel ranks hold the same split sequences; sums go slot by slot."""
        if self.layout.context == 1:
            return
        bounds = share.bounds[: int(share.split.sum()) + 1]  # of split microbatches, which come first
        split = share.rows[share.segments.rows[: bounds[-1]]]
        mine = hashlib.sha256(split.tobytes() + bounds.tobytes() + share.split.tobytes()).digest()
        at = self.layout.coordinates(self.rank)
        others = replace(at, context=0, expert=0, expert_tensor=0, expert_data=0)  # equal in its group
        theirs = {found for group, found in gather((others, mine)) if group == others}
        assert theirs == {mine}, "context-parallel ranks hold different sequences"


def _plan_facts(
    batch: TrainBatch, rows: np.ndarray, parts: list[ContextAssignment], *, counts: bool
) -> dict[str, Any]:
    """Return the figures of the step's plan that every rank needs."""
    split_counts = {}
    if counts:
        number = {True: 0, False: 0}
        for part in parts:
            number[part.split] += len(np.unique(part.segments.rows))
        split_counts = {
            "num_split_sequences": float(number[True]),
            "num_whole_sequences": float(number[False]),
        }
    return {
        "num_tokens": int(batch.lengths[rows].sum()),
        "num_computed_tokens": sum(part.plan.num_tokens for part in parts),
        "packed_tokens": sum(int(part.segments.lengths.sum()) for part in parts),
        "split_counts": split_counts,
    }


# --- communication between rank 0 and the coordinates of the layout ------------------------------------


def coordinates(layout: ParallelLayout) -> list[tuple[int, int]]:
    """Return every (data, context)."""
    return [(data, context) for data in range(layout.data) for context in range(layout.context)]


def rows_of(parts: list[ContextAssignment], layout: ParallelLayout, data: int, context: int) -> np.ndarray:
    """Return the sequences [R] in a coordinate's microbatches, ascending."""
    chosen = [
        part.segments.rows[[i for each in part.microbatches(layout, data, context) for i in each]]
        for part in parts
    ]
    return np.unique(np.concatenate([*chosen, np.zeros(0, dtype=np.int64)]))


def scatter_arrays(
    layout: ParallelLayout, rank: int, arrays_of: Callable[[int, int], dict[str, np.ndarray | None]]
) -> tuple[dict[str, np.ndarray], int]:
    """Send ``arrays_of(data, context)`` to every rank of that coordinate; also return the bytes rank 0 sent.

    Only rank 0 calls ``arrays_of``, for one coordinate after another. The lowest rank of each coordinate
    forwards the arrays to those that differ in tensor and pipeline coordinates.
    """
    at = layout.coordinates(rank)
    first = layout.rank_of(data=at.data, context=at.context)
    sent = 0
    if rank == 0:
        own = {name: values for name, values in arrays_of(0, 0).items() if values is not None}
        for data, context in coordinates(layout)[1:]:
            sent += send_arrays(arrays_of(data, context), layout.rank_of(data=data, context=context))
    else:
        own = receive_arrays(0 if rank == first else first)
    if rank == first:
        for pipeline in range(layout.pipeline):
            for tensor in range(layout.tensor):
                if pipeline or tensor:
                    send_arrays(own, first + pipeline * layout.stage_size + tensor)
    return own, sent


def scatter_to_packed(step: PackedStep, values: np.ndarray | None) -> list[torch.Tensor]:
    """Scatter rank 0's values to a field [T] float32 of each of this rank's microbatches, 0 at non-targets.

    Every rank calls it. ``values`` (rank 0's; others pass anything) are one per sequence of the step [S],
    which all ranks get, or one per token of its batch [T], of which each rank gets its sequences'.
    """

    def for_sequences() -> bool:
        assert step.batch is not None
        assert values is not None
        assert len(values) in (len(step.batch), step.batch.num_tokens), "one per sequence or token"
        return len(values) == len(step.batch)

    if from_first_rank(for_sequences):
        given = None if values is None else {"values": values.astype(np.float32)}
        each = torch.from_numpy(broadcast_arrays(given)["values"])
        return [per_sequence(batch, each.to(batch.loss_mask.device)) for batch in step.batches]

    def of_tokens(data: int, context: int) -> dict[str, np.ndarray | None]:
        assert step.batch is not None
        assert values is not None
        rows = step.shares[data * step.layout.context + context]
        return {"values": take_rows(values, step.batch.offsets, rows).astype(np.float32)}

    mine = scatter_arrays(step.layout, step.rank, of_tokens)[0]["values"]
    return [at_targets(batch, mine, step.offsets, step.rows) for batch in step.batches]


def gather_from_packed(step: PackedStep, of: Callable[[PackedBatch], torch.Tensor]) -> np.ndarray:
    """Gather ``of``'s values [T] at each microbatch's targets: [T] float64 of the step's batch, on rank 0.

    The result is aligned with the batch's token ids, 0 at non-targets; empty on other ranks, which all call
    it. ``of`` is called on the last pipeline stage, which has the logprobs.
    """
    layout, at = step.layout, step.layout.coordinates(step.rank)
    last = layout.pipeline - 1
    mine = np.zeros(int(step.offsets[-1]), dtype=np.float32)
    if at.tensor == 0 and at.pipeline == last:
        for batch in step.batches:
            add_targets(batch, of(batch), mine, step.offsets, step.rows)
        if step.rank:
            send_arrays({"values": mine}, 0)
    if step.rank:
        return np.zeros(0)
    assert step.batch is not None
    whole = np.zeros(step.batch.num_tokens)
    starts = step.batch.offsets.tolist()
    for (data, context), rows in zip(coordinates(layout), step.shares, strict=True):
        source = layout.rank_of(data=data, context=context, pipeline=last)
        values = mine if source == 0 else receive_arrays(source)["values"]
        begin = 0
        for row in rows.tolist():  # context-parallel ranks hold zeros at each other's tokens of a sequence
            length = starts[row + 1] - starts[row]
            whole[starts[row] : starts[row + 1]] += values[begin : begin + length]
            begin += length
    return whole


def reweight(
    step: PackedStep,
    num_targets: np.ndarray,
    aggregation: Aggregation,
    fixed_length: int | None = None,
    kept: np.ndarray | None = None,
) -> None:
    """Recompute the weights of a step after removing targets from the loss.

    They get weight 0, and are targets of no loss or metric from now on.

    Args:
        step: on every rank.
        num_targets: [S] (rank 0's), how many each sequence has left; 0 removes it.
        aggregation: see token_weights.
        fixed_length: for that aggregation.
        kept: [T] bool (rank 0's), the targets that are left, where sequences lose only some.
    """
    given = token_weights(num_targets, aggregation, fixed_length)
    if kept is not None and step.batch is not None:
        given = np.repeat(given, step.batch.lengths) * kept
    for batch, weights in zip(step.batches, scatter_to_packed(step, given), strict=True):
        batch.loss_weights = weights
        batch.loss_mask = (weights > 0).to(batch.loss_mask.dtype)
