"""Architecture tables: how every Hugging Face tensor is made of regions of local parameters.

A family file (llama.py, ...) lists :class:`Rule` objects as data. Loading, exporting, hand-over to an
engine and planning at scale all derive :class:`Region` lists from the same rules, so a tensor that
one of them would forget is forgotten by all, and the coverage check of the loader finds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.spec import ModelSpec

Index = tuple["int | tuple[int, int]", ...]
Box = tuple[tuple[int, int], ...]
Stage = Literal["first", "layer", "last", "last_alone"]
"""last_alone: the last pipeline stage when it is not also the first."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the parts fused in a parameter along its split dimension.

    ``size`` elements in all, dealt to ranks in multiples of ``unit`` (a head, for k and v). With
    fewer units than ranks each unit is replicated on consecutive ranks.
    """

    size: int
    unit: int = 1

    def span(self, rank: int, ranks: int, what: str) -> tuple[int, int]:
        """[start, stop) of this slot's elements on ``rank``."""
        units = self.size // self.unit
        if units >= ranks:
            if units % ranks:
                raise UserError(f"{what}: {units} units of {self.unit} do not divide by {ranks} tensor ranks")
            length = self.size // ranks
            return rank * length, (rank + 1) * length
        if ranks % units:
            raise UserError(f"{what}: {ranks} tensor ranks do not divide by {units} units of {self.unit}")
        start = rank * units // ranks * self.unit
        return start, start + self.unit


@dataclass(frozen=True, slots=True)
class Place:
    """Where one HF tensor lives on one side.

    ``param`` may contain {layer}. ``dim`` is the dimension split over tensor ranks (None: every
    rank has all of it). ``slots`` are the parts fused along ``dim`` on each rank, in memory order;
    ``slot`` is this tensor's. ``rows`` > 0 says the parameter has that many rows over all ranks
    although the HF tensor has fewer (vocabulary padding).
    """

    param: str
    stage: Stage = "layer"
    dim: int | None = None
    slots: tuple[Slot, ...] = ()
    slot: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One HF tensor (or one per layer, when ``hf`` contains {layer}) and its places."""

    hf: str
    shape: tuple[int, ...]
    trainer: tuple[Place, ...]
    engine: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """``hf[box]`` is ``param[index]`` (same shape; an int in ``index`` drops that dimension)."""

    hf: str
    box: Box
    param: str
    index: Index


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape and its complete table."""

    spec: ModelSpec
    rules: tuple[Rule, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this model has, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            for layer in range(self.spec.num_layers) if "{layer}" in rule.hf else (0,):
                shapes[rule.hf.format(layer=layer)] = rule.shape
        return shapes

    def trainer_regions(self, layout: ParallelLayout, at: RankCoordinates) -> list[Region]:
        """Regions that the Megatron parameters of one rank hold; layers are numbered from 0 per stage."""
        return self._regions("trainer", layout, at)

    def engine_regions(self, layout: ParallelLayout, at: RankCoordinates) -> list[Region]:
        """Regions that the vLLM parameters of one engine rank hold; layers keep their global number."""
        return self._regions("engine", layout, at)

    def stage_layers(self, layout: ParallelLayout, stage: int) -> range:
        """Global numbers of the layers of a pipeline stage (equal shares)."""
        if self.spec.num_layers % layout.pipeline:
            raise UserError(
                f"parallel.pipeline_parallel_size: {self.spec.num_layers} layers do not divide by "
                f"{layout.pipeline} stages"
            )
        per_stage = self.spec.num_layers // layout.pipeline
        return range(stage * per_stage, (stage + 1) * per_stage)

    def _regions(
        self, side: Literal["trainer", "engine"], layout: ParallelLayout, at: RankCoordinates
    ) -> list[Region]:
        layers = self.stage_layers(layout, at.pipeline)
        regions = []
        for rule in self.rules:
            for place in rule.trainer if side == "trainer" else rule.engine:
                if place.stage == "first" and at.pipeline != 0:
                    continue
                if place.stage.startswith("last") and at.pipeline != layout.pipeline - 1:
                    continue
                if place.stage == "last_alone" and layout.pipeline == 1:
                    continue
                for number in layers if place.stage == "layer" else (0,):
                    local = number - layers.start if side == "trainer" else number
                    region = _region(rule, place, number, local, layout.tensor, at.tensor)
                    if region is not None:
                        regions.append(region)
        return regions


def _region(rule: Rule, place: Place, layer: int, local_layer: int, ranks: int, rank: int) -> Region | None:
    hf = rule.hf.format(layer=layer)
    param = place.param.format(layer=local_layer)
    box = [(0, size) for size in rule.shape]
    index = list(box)
    dim = place.dim
    if dim is not None and place.rows:
        start, stop = Slot(place.rows).span(rank, ranks, hf)
        stop = min(stop, rule.shape[dim])
        if stop <= start:  # this rank holds padding only
            return None
        box[dim], index[dim] = (start, stop), (0, stop - start)
    elif dim is not None:
        slots = place.slots or (Slot(rule.shape[dim]),)
        spans = [slot.span(rank, ranks, hf) for slot in slots]
        offset = sum(stop - start for start, stop in spans[: place.slot])
        start, stop = spans[place.slot]
        box[dim], index[dim] = (start, stop), (offset, offset + stop - start)
    return Region(hf, tuple(box), param, tuple(index))


def name_problems(expected: Iterable[str], found: Iterable[str], where: str) -> list[str]:
    """A line for every missing and every left-over tensor."""
    names, present = set(expected), set(found)
    return [f"{where}: missing tensor {name}" for name in sorted(names - present)] + [
        f"{where}: no rule maps tensor {name}" for name in sorted(present - names)
    ]
