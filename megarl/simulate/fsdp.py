"""Memory and traffic of a trainer with ``backend: torch``: FSDP2 over layers, replicas, tensor ranks.

FSDP cuts the first dimension of each parameter, after tensor parallelism, over the shard ranks (Zhao et al.
2023, arXiv:2304.11277). A layer's weights are gathered for its passes; embedding, final norm and head are
gathered together. Experts are stacked, [experts, ...], and cut by experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from megarl.config.plan import PlanConfig
from megarl.layout import ParallelLayout
from megarl.models.lora import local_elements
from megarl.models.table import Architecture, Box, Place, Region, Rule
from megarl.simulate.activations import Microbatch, stage_bytes
from megarl.simulate.layouts import Layouts
from megarl.simulate.memory import GpuMemory
from megarl.simulate.shapes import ITEM_BYTES
from megarl.simulate.transfer import Seconds, seconds
from megarl.weights.alias import contiguous_stride
from megarl.weights.plan import Owner
from megarl.weights.sync_plan import SharedStorage, SourceView

_ROOT = -1
"""Number of what is beside the layers."""
_LAYERS_GATHERED = 2
"""At a time: the layer that is computed, and the next one, which is fetched meanwhile."""
_FP32 = ITEM_BYTES["float32"]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of transformers' model on one tensor rank; ``layer`` is -1 beside the layers.

    Args:
        hf: the checkpoint's tensor; of experts, with {expert} for the first dimension.
        shape: local, before FSDP.
        at: where in the tensor the local part lies, without the dimension of experts.
        experts: number of stacked experts; 0 for another parameter.
        layer: number of its layer.
    """

    hf: str
    shape: tuple[int, ...]
    at: Box
    experts: int
    layer: int

    @property
    def size(self) -> int:
        """Elements on a tensor rank."""
        return math.prod(self.shape)

    def rows(self, shards: int, shard: int) -> tuple[int, int]:
        """Return [start, stop) of the first dimension on one shard rank; empty on the last ones if few."""
        each = -(-self.shape[0] // shards)
        start = min(shard * each, self.shape[0])
        return start, min(start + each, self.shape[0])

    def sharded(self, shards: int) -> int:
        """Elements on the fullest shard rank."""
        return -(-self.shape[0] // shards) * (self.size // self.shape[0])


def num_shards(config: PlanConfig, layout: ParallelLayout) -> int:
    """Return how many ranks share one copy of a tensor rank's parameters."""
    return layout.data // config.trainer.replicate_size


def is_sharded(config: PlanConfig, layout: ParallelLayout) -> bool:
    """Return whether FSDP has anything to do: on a lone data-parallel rank it has not, unless it offloads."""
    return layout.data > 1 or config.trainer.cpu_offload


def params_of(architecture: Architecture, layout: ParallelLayout, tensor: int = 0) -> list[Param]:
    """Return the parameters of one tensor rank. What no table splits is assumed to be split by rows."""
    found = []
    layers = range(architecture.spec.num_layers)
    for rule in architecture.rules:
        place = rule.trainer[0] if rule.trainer else None
        experts = architecture.num_experts if "{expert}" in rule.hf else 0
        at = _box(rule, place, layout.tensor, tensor)
        shape = tuple(stop - start for start, stop in at)
        numbers = (layers if rule.layers is None else rule.layers) if "{layer}" in rule.hf else (_ROOT,)
        for number in numbers:
            name = rule.hf.format(layer=number, expert="{expert}")
            found.append(Param(name, (experts, *shape) if experts else shape, at, experts, _layer(name)))
    return found


def _box(rule: Rule, place: Place | None, ranks: int, rank: int) -> Box:
    dim = place.dim if place is not None else (0 if len(rule.shape) > 1 else None)
    box = [(0, size) for size in rule.shape]
    if dim is not None:
        each = -(-rule.shape[dim] // ranks)
        box[dim] = (min(rank * each, rule.shape[dim]), min((rank + 1) * each, rule.shape[dim]))
    return tuple(box)


def _layer(name: str) -> int:
    """Return the number after "layers" in a tensor's name."""
    parts = name.split(".")
    at = parts.index("layers") + 1 if "layers" in parts else len(parts)
    return int(parts[at]) if at < len(parts) and parts[at].isdigit() else _ROOT


def _by_layer(params: list[Param]) -> tuple[dict[int, int], int]:
    """Return the elements of each layer, and of what is beside them."""
    sizes: dict[int, int] = defaultdict(int)
    for param in params:
        sizes[param.layer] += param.size
    root = sizes.pop(_ROOT, 0)
    return sizes, root


def rank_memory(config: PlanConfig, architecture: Architecture, layouts: Layouts) -> GpuMemory:
    """Return the memory of the fullest trainer rank.

    Gradients are summed in float32 over a step's microbatches before they are reduced, so all of a tensor
    rank's are there at once, unless there is one microbatch, or each is reduced: then a layer's are reduced
    as soon as they are there. No gradient stays between two steps. With cpu_offload parameters, their
    gradients once reduced, and the optimizer are in host memory.
    """
    trainer, layout, dtypes = config.trainer, layouts.trainer, config.dtypes
    params = params_of(architecture, layout)
    shards = num_shards(config, layout)
    item, gradient = ITEM_BYTES[dtypes.parameters], ITEM_BYTES[dtypes.gradients]
    held, whole = sum(param.sharded(shards) for param in params), sum(param.size for param in params)
    trained, trained_whole, adapted = held, whole, 0
    if (lora := trainer.lora) is not None:
        adapters, weights = local_elements(architecture, lora, _boxes(params))
        trained, trained_whole, adapted = -(-adapters // shards), adapters, -(-weights // shards)
    layers, root = _by_layer(params)
    largest = max(layers.values(), default=0)
    sharded = is_sharded(config, layout)
    gathered = 0
    if sharded:
        kept = _LAYERS_GATHERED * largest if trainer.reshard_after_forward else sum(layers.values())
        gathered = (kept + root) * item
    gradients = trained_whole * gradient
    if sharded and (trainer.num_microbatches == 1 or trainer.reduce_each_microbatch):
        at_once = min(trained_whole, largest + root)
        gradients = at_once * (item + gradient) + (0 if trainer.cpu_offload else trained * gradient)
    master = 0 if dtypes.parameters == "float32" else _FP32
    optimizer = trained * (master + 2 * ITEM_BYTES[dtypes.moments])
    parameters = held * item + (trained * item if lora is not None else 0)
    reference = held * item if trainer.keep_reference and lora is None else 0
    if trainer.cpu_offload:
        parameters = optimizer = reference = 0
    activations = stage_bytes(
        architecture.spec,
        layout,
        0,
        Microbatch(config.workload.tokens_per_microbatch, item),
        recompute=trainer.activation_recompute,
        num_microbatches=1,
    )
    return GpuMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        merged=adapted * item,
        gathered=gathered,
        activations=math.ceil(activations),
    )


def _boxes(params: list[Param]) -> list[Region]:
    """Return what a tensor rank holds of each tensor; experts, which have no adapters, are left out."""
    return [Region(param.hf, param.at, param.hf, param.at) for param in params if not param.experts]


@dataclass(frozen=True, slots=True)
class Collectives:
    """Bytes that a trainer GPU receives: weights gathered for one microbatch, and a reduction of gradients.

    ``reduced`` arrives from the ranks of a shard group, ``replicated`` from the other replicas.
    """

    gathered: int
    reduced: int
    replicated: int
    gather_seconds: Seconds
    reduce_seconds: Seconds


def collectives(config: PlanConfig, architecture: Architecture, layouts: Layouts) -> Collectives | None:
    """Return the traffic of FSDP; None where there is none.

    Durations are as if each byte entered a host once, shared by the group's GPUs there.
    """
    layout, trainer = layouts.trainer, config.trainer
    if not is_sharded(config, layout):
        return None
    shards, replicas = num_shards(config, layout), trainer.replicate_size
    params = params_of(architecture, layout)
    layers, root = _by_layer(params)
    times = 2 if trainer.reshard_after_forward else 1
    whole = (times * sum(layers.values()) + root) * ITEM_BYTES[config.dtypes.parameters]
    trained = sum(layers.values()) + root
    if trainer.lora is not None:
        trained, _ = local_elements(architecture, trainer.lora, _boxes(params))
    gradients = trained * _FP32
    # Ring: reduce-scatter and all-gather of a shard's gradients.
    replicated = 2 * gradients * (replicas - 1) // (replicas * shards)
    gather, reduce = _entering(config, layout, whole), _entering(config, layout, gradients)
    across = config.gpu.gpus_per_host < layout.tensor * shards * replicas
    return Collectives(
        sum(gather),
        sum(reduce),
        replicated,
        seconds(config.gpu, local=0, nvlink=gather[0], network=gather[1]),
        seconds(
            config.gpu,
            local=0,
            nvlink=reduce[0] + (0 if across else replicated),
            network=reduce[1] + (replicated if across else 0),
        ),
    )


def _entering(config: PlanConfig, layout: ParallelLayout, whole: int) -> tuple[int, int]:
    """Return the bytes a shard rank receives of ``whole`` by NVLink, and over the network."""
    shards = num_shards(config, layout)
    here = max(1, min(shards, config.gpu.gpus_per_host // layout.tensor))  # of the group, on one host
    received = whole * (shards - 1) // shards
    network = whole * (shards - here) // shards // here
    return received - network, network


def owners_of(config: PlanConfig, architecture: Architecture, layouts: Layouts) -> list[Owner]:
    """Return the owner of each trainer rank: its rows of every parameter."""
    layout, shards = layouts.trainer, num_shards(config, layouts.trainer)
    item, dtype = ITEM_BYTES[config.dtypes.parameters], config.dtypes.parameters
    made: dict[tuple[int, int], tuple[list[Region], dict[str, SourceView], int]] = {}
    owners = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        key = at.tensor, at.data % shards
        if key not in made:
            made[key] = _part(params_of(architecture, layout, at.tensor), dtype, shards, key[1])
        regions, views, end = made[key]
        host, device = divmod(rank, config.gpu.gpus_per_host)
        storage = SharedStorage((b"shards", b"%d" % rank, end * item))
        owners.append(Owner(regions, views, [storage], rank, str(host), str(device)))
    return owners


def _part(
    params: list[Param], dtype: str, shards: int, shard: int
) -> tuple[list[Region], dict[str, SourceView], int]:
    regions: list[Region] = []
    views: dict[str, SourceView] = {}
    end = 0
    for param in params:
        start, stop = param.rows(shards, shard)
        if stop == start:
            continue
        shape = (stop - start, *param.shape[1:])
        views[param.hf] = SourceView(0, dtype, end, shape, contiguous_stride(shape))
        end += math.prod(shape)
        regions += _regions(param, start, stop)
    return regions, views, end


def _regions(param: Param, start: int, stop: int) -> Iterator[Region]:
    here = [(0, size) for size in param.shape]
    if param.experts:
        for expert in range(start, stop):
            yield Region(param.hf.format(expert=expert), param.at, param.hf, (expert - start, *here[1:]))
        return
    first = param.at[0][0]
    box = ((first + start, first + stop), *param.at[1:])
    yield Region(param.hf, box, param.hf, ((0, stop - start), *here[1:]))
