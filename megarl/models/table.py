"""Architecture tables: map every Hugging Face tensor to regions of local parameters.

A family file (llama.py, ...) lists :class:`Rule` objects as data. Loading, export, weight sync and planning
all derive :class:`Region` lists from the same rules, so a missing tensor is missing in all of them, and the
coverage check of the loader finds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.spec import ModelSpec

Index = tuple["int | tuple[int, int]", ...]
Box = tuple[tuple[int, int], ...]
Stage = Literal["first", "layer", "last", "last_alone"]
"""last_alone: the last pipeline stage if it is not also the first."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the tensors fused in a parameter along its split dimension.

    ``size`` elements in total, split over ranks in multiples of ``unit`` (a head, for k and v). With fewer
    units than ranks each unit is replicated on consecutive ranks.
    """

    size: int
    unit: int = 1

    def span(self, rank: int, ranks: int, what: str, kind: str = "tensor ranks") -> tuple[int, int]:
        """Return [start, stop) of this slot's elements on ``rank``; UserError if they do not divide."""
        units = self.size // self.unit
        if units >= ranks:
            if units % ranks:
                raise UserError(f"{what}: {units} units of {self.unit} do not divide by {ranks} {kind}")
            length = self.size // ranks
            return rank * length, (rank + 1) * length
        if ranks % units:
            raise UserError(f"{what}: {ranks} {kind} do not divide by {units} units of {self.unit}")
        start = rank * units // ranks * self.unit
        return start, start + self.unit


@dataclass(frozen=True, slots=True)
class Place:
    """Location of an HF tensor in the parameters of one side.

    ``param`` may contain {layer}. ``dim`` is the dimension split over tensor ranks (None: replicated).
    ``slots`` are the tensors fused along ``dim`` (None: dimension 0) on each rank, in memory order; ``slot``
    is this tensor's index. With ``padded``, the parameter has the rows of the padded vocabulary over all
    ranks, although the HF tensor has fewer.

    With ``expert``, the parameter stacks experts in a leading dimension that the HF tensor (one per expert)
    lacks: consecutive experts are assigned to expert ranks, and ``dim``, which counts the HF tensor's
    dimensions, is split over expert-tensor ranks.
    """

    param: str
    stage: Stage = "layer"
    dim: int | None = None
    slots: tuple[Slot, ...] = ()
    slot: int = 0
    padded: bool = False
    expert: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One HF tensor and its places; one per layer and expert if ``hf`` contains {layer}, {expert}.

    ``layers`` are the global numbers of its layers (None: all).
    """

    hf: str
    shape: tuple[int, ...]
    trainer: tuple[Place, ...]
    engine: tuple[Place, ...]
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """``hf[box]`` equals ``param[index]`` (same shape; an int in ``index`` drops that dimension)."""

    hf: str
    box: Box
    param: str
    index: Index


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a model and its complete table.

    Checkpoint tensors whose names start with one of ``ignored`` need no rule.
    """

    spec: ModelSpec
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Return whether the model does not need this checkpoint tensor."""
        return name.startswith(self.ignored) if self.ignored else False

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors in a checkpoint of this model."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            experts = range(self.num_experts if "{expert}" in rule.hf else 1)
            for layer in self._layers(rule) if "{layer}" in rule.hf else (0,):
                for expert in experts:
                    shapes[rule.hf.format(layer=layer, expert=expert)] = rule.shape
        return shapes

    @property
    def num_experts(self) -> int:
        """Number of experts per MoE layer; 0 for a dense model."""
        return self.spec.moe.num_experts if self.spec.moe else 0

    def trainer_regions(self, layout: ParallelLayout, at: RankCoordinates) -> list[Region]:
        """Return the regions of the Megatron parameters of one rank.

        Layers are numbered from 0 per stage. With virtual stages, parameters of chunk c have the prefix
        ``chunk{c}.``, and its layers are numbered from 0.
        """
        if layout.virtual == 1:
            return self._regions("trainer", layout, at, 0)
        regions = []
        for chunk in range(layout.virtual):
            for region in self._regions("trainer", layout, at, chunk):
                regions.append(replace(region, param=f"chunk{chunk}.{region.param}"))
        return regions

    def engine_regions(self, layout: ParallelLayout, at: RankCoordinates) -> list[Region]:
        """Return the regions of the vLLM parameters of one engine rank; layers keep their global number."""
        return self._regions("engine", layout, at, 0)

    def _layers(self, rule: Rule) -> Iterable[int]:
        return range(self.spec.num_layers) if rule.layers is None else rule.layers

    def _regions(
        self, side: Literal["trainer", "engine"], layout: ParallelLayout, at: RankCoordinates, chunk: int
    ) -> list[Region]:
        layers = layout.stage_layers(self.spec.num_layers, at.pipeline, chunk)
        first = at.pipeline == 0 and chunk == 0
        last = at.pipeline == layout.pipeline - 1 and chunk == layout.virtual - 1
        regions = []
        for rule in self.rules:
            for place in rule.trainer if side == "trainer" else rule.engine:
                if place.stage == "first" and not first:
                    continue
                if place.stage.startswith("last") and not last:
                    continue
                if place.stage == "last_alone" and first:
                    continue
                numbers: Iterable[int] = (0,)
                if place.stage == "layer":
                    numbers = [n for n in self._layers(rule) if n in layers]
                for number in numbers:
                    local = number - layers.start if side == "trainer" else number
                    regions += self._place(rule, place, number, local, layout, at)
        return regions

    def _place(
        self, rule: Rule, place: Place, layer: int, local: int, layout: ParallelLayout, at: RankCoordinates
    ) -> list[Region]:
        """Return the regions of one place in one layer: one, one per local expert, or [] (padding only)."""
        param = place.param.format(layer=local)
        hf = rule.hf.format(layer=layer, expert="{expert}")
        ranks, rank = (layout.expert_tensor, at.expert_tensor) if place.expert else (layout.tensor, at.tensor)
        padded = self.spec.padded_vocab(ranks) if place.padded else 0
        cut = _cut(hf, rule.shape, place, padded, ranks, rank)
        if cut is None:
            return []
        box, index = cut
        if not place.expert:
            return [Region(hf, box, param, index)]
        start, stop = Slot(self.num_experts).span(at.expert, layout.expert, hf, "expert ranks")
        return [
            Region(hf.format(expert=expert), box, param, (expert - start, *index))
            for expert in range(start, stop)
        ]


def _cut(
    hf: str, shape: tuple[int, ...], place: Place, padded: int, ranks: int, rank: int
) -> tuple[Box, Index] | None:
    """Return a rank's box of the HF tensor and its index in the parameter (without the expert dimension)."""
    box = [(0, size) for size in shape]
    index = list(box)
    dim = place.dim
    if dim is not None and padded:
        start, stop = Slot(padded).span(rank, ranks, hf)
        stop = min(stop, shape[dim])
        if stop <= start:  # this rank holds padding only
            return None
        box[dim], index[dim] = (start, stop), (0, stop - start)
    elif dim is not None:
        slots = place.slots or (Slot(shape[dim]),)
        spans = [slot.span(rank, ranks, hf) for slot in slots]
        offset = sum(stop - start for start, stop in spans[: place.slot])
        start, stop = spans[place.slot]
        box[dim], index[dim] = (start, stop), (offset, offset + stop - start)
    elif place.slots:  # fused and replicated
        offset = sum(slot.size for slot in place.slots[: place.slot])
        index[0] = (offset, offset + shape[0])
    return tuple(box), tuple(index)


def name_problems(expected: Iterable[str], found: Iterable[str], where: str) -> list[str]:
    """Return one line per missing and per unmapped tensor."""
    names, present = set(expected), set(found)
    return [f"{where}: missing tensor {name}" for name in sorted(names - present)] + [
        f"{where}: no rule maps tensor {name}" for name in sorted(present - names)
    ]
