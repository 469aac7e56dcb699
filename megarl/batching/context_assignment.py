"""Which sequences the context-parallel ranks share, and which one of them computes whole.

A short sequence split over ranks costs more than it saves: padding to 2 * ranks, and a gather of keys and
values in every layer. With ``split_from`` an optimizer step has two kinds of microbatches. *Split* ones hold
the long sequences, each over all context-parallel ranks. *Whole* ones hold the short ones: there every
context-parallel rank has a pack of its own, as if it were one more data-parallel rank, of at most its share
of the token budget, so that a rank holds no more tokens than in a split one.
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
    """What the plan of a step must keep to."""

    max_tokens: int  # of a microbatch, over its context-parallel ranks
    group_size: int = 1  # neighbours that share a microbatch
    share_prefixes: bool = False
    split_from: int | None = None  # tokens from which on a sequence is split; None: all are


@dataclass(frozen=True, slots=True)
class ContextAssignment:
    """The microbatches of one kind, of all ranks; the plan counts ``segments``."""

    split: bool
    segments: Segments
    plan: PackingPlan
    pad_to_multiple: int

    def microbatches(self, layout: ParallelLayout, data: int, context: int) -> list[list[int]]:
        """Those of a rank by its coordinates; a split one is the same for all context-parallel ranks."""
        return self.plan.microbatches[data if self.split else data * layout.context + context]


def assign_contexts(
    batch: TrainBatch, rows: np.ndarray, limits: MicrobatchLimits, costs: CostModel, layout: ParallelLayout
) -> list[ContextAssignment]:
    """Plan sequences ``rows`` of ``batch``: split microbatches, and with split_from whole ones after them.

    All ranks take the parts in this order, and each part has equal counts: the collectives of its passes
    meet. Kinds without a sequence are left out, unless there is none at all. A group is whole if all its
    sequences are shorter than split_from and it fits one rank's share of the budget together.

    Raises:
        UserError: a sequence is empty or a group longer than the budget.
    """
    whole = np.zeros(len(rows), dtype=bool)
    if limits.split_from is not None and layout.context > 1:
        whole = _are_whole(batch.lengths[rows], limits, layout)
    kinds = [(True, rows[~whole])] if not whole.all() or not len(rows) else []
    kinds += [(False, rows[whole])] if whole.any() else []
    return [_part(is_split, batch, kind, limits, costs, layout) for is_split, kind in kinds]


def multiple_of(split: bool, layout: ParallelLayout) -> int:
    """What every sequence is padded to a multiple of."""
    multiple = layout.tensor if layout.sequence_parallel else 1
    return multiple * 2 * layout.context if split and layout.context > 1 else multiple


def _are_whole(lengths: np.ndarray, limits: MicrobatchLimits, layout: ParallelLayout) -> np.ndarray:
    assert limits.split_from is not None
    multiple = multiple_of(False, layout)
    groups = lengths.reshape(-1, limits.group_size)
    together = (-(-groups // multiple) * multiple).sum(axis=1)
    whole = (groups < limits.split_from).all(axis=1) & (together <= limits.max_tokens // layout.context)
    return np.repeat(whole, limits.group_size)


def _part(
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
