"""Which sequences the context-parallel ranks share, and which one of them computes whole.

A short sequence split over ranks costs more than it saves: padding to 2 * ranks, and a gather of keys and
values in every layer. With ``split_from`` an optimizer step has two kinds of microbatches. *Split* ones hold
the long sequences, each over all context-parallel ranks. *Whole* ones hold the short ones: there every
context-parallel rank has a pack of its own, as if it were one more data-parallel rank, of at most its share
of the token budget, so that a rank holds no more tokens than in a split one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.layout import ParallelLayout, RankCoordinates
from megarl.packing.plan import CostModel, PackingPlan, plan_groups
from megarl.packing.shared_prefix import plan_units, share_prefixes
from megarl.records import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What the plan of a step must keep to."""

    max_tokens: int  # of a microbatch, over its context-parallel ranks
    group_size: int = 1  # neighbours that share a microbatch
    share_prefixes: bool = False
    split_from: int | None = None  # tokens from which on a sequence is split; None: all are


@dataclass(frozen=True, slots=True)
class Part:
    """The microbatches of one kind: what to pack, and how one rank packs its own.

    ``plan`` counts ``sequences``; ``origins`` gives each its number in the step, ``prefix_of`` the number of
    its shared prefix in ``sequences`` (-1: none). ``rank`` is this rank's row of the plan.
    """

    split: bool
    sequences: list[Sequence]
    origins: list[int]
    prefix_of: list[int] | None
    plan: PackingPlan
    rank: int
    pad_to_multiple: int
    cp_rank: int
    cp_size: int

    @property
    def microbatches(self) -> list[list[int]]:
        """This rank's."""
        return self.plan.microbatches[self.rank]


def place(
    sequences: list[Sequence],
    numbers: list[int],
    limits: Limits,
    costs: CostModel,
    layout: ParallelLayout,
    at: RankCoordinates,
) -> list[Part]:
    """Plan ``sequences[i] for i in numbers``: split microbatches, and with split_from whole ones after them.

    All ranks take the parts in this order, and each part has equal counts: the collectives of its passes
    meet. Kinds without a sequence are left out, unless there is none at all. A group is whole if all its
    sequences are shorter than split_from and it fits one rank's share of the budget together.

    Raises:
        UserError: a sequence is empty or a group longer than the budget.
    """
    whole: list[int] = []
    if limits.split_from is not None and layout.context > 1:
        for start in range(0, len(numbers), limits.group_size):
            group = numbers[start : start + limits.group_size]
            if _is_whole([len(sequences[i].token_ids) for i in group], limits, layout):
                whole += group
    others = set(whole)
    split = [i for i in numbers if i not in others]
    kinds = [(True, split)] if split or not whole else []
    kinds += [(False, whole)] if whole else []
    return [_part(is_split, sequences, kind, limits, costs, layout, at) for is_split, kind in kinds]


def _multiple(layout: ParallelLayout) -> int:
    """What a sequence is padded to that is not split."""
    return layout.tensor if layout.sequence_parallel else 1


def _is_whole(lengths: list[int], limits: Limits, layout: ParallelLayout) -> bool:
    assert limits.split_from is not None
    multiple = _multiple(layout)
    together = sum(-(-length // multiple) * multiple for length in lengths)
    return max(lengths) < limits.split_from and together <= limits.max_tokens // layout.context


def _part(
    split: bool,
    sequences: list[Sequence],
    numbers: list[int],
    limits: Limits,
    costs: CostModel,
    layout: ParallelLayout,
    at: RankCoordinates,
) -> Part:
    multiple, max_tokens = _multiple(layout), limits.max_tokens
    num_ranks, rank, cp_rank, cp_size = layout.data, at.data, at.context, layout.context
    if not split:
        max_tokens //= layout.context
        num_ranks, rank = layout.data * layout.context, at.data * layout.context + at.context
        cp_rank, cp_size = 0, 1
    elif layout.context > 1:
        multiple *= 2 * layout.context
    chosen, origins, prefix_of = [sequences[i] for i in numbers], numbers, None
    within: dict[str, int] = {
        "max_tokens": max_tokens,
        "num_ranks": num_ranks,
        "pad_to_multiple": multiple,
        "microbatch_group_size": layout.pipeline if layout.virtual > 1 else 1,
    }
    if limits.group_size == 1 and limits.share_prefixes:
        shared = share_prefixes(chosen, max_tokens=max_tokens, pad_to_multiple=multiple)
        chosen, prefix_of = shared.sequences, shared.prefix_of
        origins = [numbers[i] for i in shared.origins]
        plan = plan_units(shared, costs=costs, **within)
    else:
        lengths = [len(s.token_ids) for s in chosen]
        plan = plan_groups(lengths, group_size=limits.group_size, costs=costs, **within)
    return Part(split, chosen, origins, prefix_of, plan, rank, multiple, cp_rank, cp_size)
