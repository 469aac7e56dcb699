"""Assign sequences to context-parallel ranks: split over all of them, or computed whole by one.

Splitting a short sequence costs more than it saves: padding to 2 * ranks, and a gather of keys and values in
every layer. With ``split_from`` an optimizer step has two kinds of microbatches. *Split* ones hold the long
sequences, each over all context-parallel ranks. *Whole* ones hold the short ones: every context-parallel rank
packs its own, like one more data-parallel rank, up to its share of the token budget, so a rank holds no more
tokens than in a split microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megarl.batching.microbatch_plan import CostModel, PackingPlan, plan_groups
from megarl.batching.segments import Segments
from megarl.batching.shared_prefix import plan_units, share_prefixes
from megarl.layout import ParallelLayout
from megarl.records import TrainBatch


@dataclass(frozen=True, slots=True)
class MicrobatchLimits:
    """Constraints on the plan of a step."""

    max_tokens: int  # of a microbatch, over its context-parallel ranks
    group_size: int = 1  # consecutive sequences that share a microbatch
    share_prefixes: bool = False
    split_from: int | None = None  # length in tokens from which a sequence is split; None: all are


@dataclass(frozen=True, slots=True)
class ContextAssignment:
    """All ranks' microbatches of one kind; the plan indexes ``segments``."""

    split: bool
    segments: Segments
    plan: PackingPlan
    pad_to_multiple: int

    def microbatches(self, layout: ParallelLayout, data: int, context: int) -> list[list[int]]:
        """Return a rank's microbatches; split ones are the same for all context-parallel ranks."""
        return self.plan.microbatches[data if self.split else data * layout.context + context]


def assign_contexts(
    batch: TrainBatch, rows: np.ndarray, limits: MicrobatchLimits, costs: CostModel, layout: ParallelLayout
) -> list[ContextAssignment]:
    """Plan sequences ``rows`` of ``batch``: split microbatches and, with split_from, whole ones after them.

    All ranks process the parts in this order, and each part has equal counts, so the collectives of their
    passes match. A kind without sequences is left out, unless both are empty. A group is whole if all its
    sequences are shorter than split_from and it fits one rank's share of the budget together.

    Raises:
        UserError: a sequence is empty or a group longer than the budget.
    """
    whole = np.zeros(len(rows), dtype=bool)
    if limits.split_from is not None and layout.context > 1:
        whole = _whole_mask(batch.lengths[rows], limits, layout)
    kinds = [(True, rows[~whole])] if not whole.all() or not len(rows) else []
    kinds += [(False, rows[whole])] if whole.any() else []
    return [_assignment(is_split, batch, kind, limits, costs, layout) for is_split, kind in kinds]


def multiple_of(split: bool, layout: ParallelLayout) -> int:
    """Return the multiple that every sequence is padded to."""
    multiple = layout.tensor if layout.sequence_parallel else 1
    return multiple * 2 * layout.context if split and layout.context > 1 else multiple


def _whole_mask(lengths: np.ndarray, limits: MicrobatchLimits, layout: ParallelLayout) -> np.ndarray:
    assert limits.split_from is not None
    multiple = multiple_of(False, layout)
    groups = lengths.reshape(-1, limits.group_size)
    together = (-(-groups // multiple) * multiple).sum(axis=1)
    whole = (groups < limits.split_from).all(axis=1) & (together <= limits.max_tokens // layout.context)
    return np.repeat(whole, limits.group_size)


def _assignment(
    split: bool,
    batch: TrainBatch,
    rows: np.ndarray,
    limits: MicrobatchLimits,
    costs: CostModel,
    layout: ParallelLayout,
) -> ContextAssignment:
    multiple = multiple_of(split, layout)
    within: dict[str, int] = {
        "max_tokens": limits.max_tokens if split else limits.max_tokens // layout.context,
        "num_ranks": layout.data if split else layout.data * layout.context,
        "pad_to_multiple": multiple,
        "microbatch_group_size": layout.pipeline if layout.virtual > 1 else 1,
    }
    if limits.group_size == 1 and limits.share_prefixes:
        segments, bounds = share_prefixes(
            batch, rows, max_tokens=within["max_tokens"], pad_to_multiple=multiple
        )
        plan = plan_units(segments, bounds, costs=costs, **within)
    else:
        segments = Segments.whole(batch, rows)
        plan = plan_groups(segments.lengths, group_size=limits.group_size, costs=costs, **within)
    return ContextAssignment(split, segments, plan, multiple)
