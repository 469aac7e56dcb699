"""Shapes of a rank's parameters, from the architecture's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.table import Architecture, Region
from megarl.simulate.layouts import Side

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True, slots=True)
class ParamShape:
    """One parameter. ``expert``: it stacks experts, which are replicated on other ranks than the rest."""

    shape: tuple[int, ...]
    expert: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def stage_shapes(
    architecture: Architecture, side: Side, layout: ParallelLayout, at: RankCoordinates
) -> dict[str, ParamShape]:
    """Return all parameters of a rank, in the table's order, padding rows included.

    Ranks of a pipeline stage have equal shapes: of ``at`` only the stage matters.
    """
    # The first tensor rank, which always has rows that are not padding.
    first = replace(RankCoordinates(), pipeline=at.pipeline)
    regions_of = architecture.trainer_regions if side == "trainer" else architecture.engine_regions
    found = _bounds(regions_of(layout, first))
    rows = architecture.spec.padded_vocab(layout.tensor) // layout.tensor
    for name in _padded_names(architecture, side, layout):
        if name in found:
            found[name] = ParamShape((rows, *found[name].shape[1:]), False)
    return found


def _bounds(regions: Iterable[Region]) -> dict[str, ParamShape]:
    """Return the extent of the regions in each parameter."""
    ends: dict[str, tuple[int, ...]] = {}
    experts = set()
    for region in regions:
        end = tuple([entry + 1 if isinstance(entry, int) else entry[1] for entry in region.index])
        known = ends.get(region.param)
        ends[region.param] = end if known is None else tuple(map(max, known, end))
        if len(region.box) < len(region.index):
            experts.add(region.param)
    return {name: ParamShape(end, name in experts) for name, end in ends.items()}


def _padded_names(architecture: Architecture, side: Side, layout: ParallelLayout) -> list[str]:
    names = {
        place.param
        for rule in architecture.rules
        for place in (rule.trainer if side == "trainer" else rule.engine)
        if place.padded
    }
    prefixes = [""]
    if side == "trainer" and layout.virtual > 1:
        prefixes = [f"chunk{chunk}." for chunk in range(layout.virtual)]
    return [prefix + name for prefix in prefixes for name in names]


def num_elements(shapes: Mapping[str, ParamShape], *, expert: bool | None = None) -> int:
    """Return the number of elements: of all parameters (None), experts (True) or the others (False)."""
    return sum(each.size for each in shapes.values() if expert is None or each.expert == expert)


def hf_elements(architecture: Architecture) -> int:
    """Return the number of parameters: elements of all Hugging Face tensors."""
    return sum(math.prod(shape) for shape in architecture.hf_shapes().values())


def active_elements(architecture: Architecture) -> int:
    """Return the number of active parameters per token: all except routed experts that are not selected."""
    moe = architecture.spec.moe
    total = hf_elements(architecture)
    if moe is None:
        return total
    expert = 3 * moe.intermediate_size * architecture.spec.hidden_size
    return total - len(moe.layers) * (moe.num_experts - moe.experts_per_token) * expert
