"""Weight-sync traffic between GPUs: by MegaRL's plan, and by gathering full tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

from megarl.config.plan import PlanConfig, PlanGpuConfig
from megarl.layout import RankCoordinates
from megarl.models.table import Architecture, Region
from megarl.simulate.layouts import Layouts, engine_table
from megarl.simulate.shapes import ITEM_BYTES, ParamShape, hf_elements, num_elements, stage_shapes
from megarl.weights.alias import contiguous_stride
from megarl.weights.plan import Owner, Planner, Reader
from megarl.weights.sync_plan import ParamInfo, PeerCopy, SharedStorage, SourceView, Storage, WeightPlan

_GAP = 64  # elements between parameters: Megatron's buffers align them, and reverse their order


@dataclass(slots=True)
class Traffic:
    """Bytes by GPU: ``aliased`` to ``network`` by engine rank, ``sent_*`` by trainer rank.

    ``local`` is copied within the GPU, ``nvlink`` received from another GPU of the host, ``network`` from
    another host; ``padding`` are vocabulary rows that are not written. They sum to the engine's parameters.
    """

    aliased: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)
    nvlink: list[int] = field(default_factory=list)
    network: list[int] = field(default_factory=list)
    padding: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)  # number of copies of all kinds
    sent_nvlink: list[int] = field(default_factory=list)
    sent_network: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Duration of each kind of transfer on the busiest GPU, at the given bandwidths.

    At best they overlap fully, so the longest is a lower bound of the weight sync.
    """

    local: float
    nvlink: float
    network: float

    @property
    def bound(self) -> float:
        """Lower bound of the weight sync in seconds."""
        return max(self.local, self.nvlink, self.network)


@dataclass(frozen=True, slots=True)
class Gathering:
    """Traffic of the alternative: every rank gathers every Hugging Face tensor into a bucket, from which
    the engine copies its slices. Maximum bytes per GPU, as if each byte entered a host once.
    """

    network: int
    nvlink: int
    local: int
    seconds: Seconds


def trainer_owners(
    config: PlanConfig, architecture: Architecture, layouts: Layouts, stages: list[dict[str, ParamShape]]
) -> list[Owner]:
    """Return the owner of each trainer rank; ranks with the same parameters share lists."""
    layout, per_host = layouts.trainer, config.gpu.gpus_per_host
    item, dtype = ITEM_BYTES[config.dtypes.parameters], config.dtypes.parameters
    views: list[dict[str, SourceView]] = []
    ends: list[list[int]] = []
    for shapes in stages:
        placed: dict[str, SourceView] = {}
        end = [0, 0]  # Megatron has separate buffers for dense parameters and experts
        for name, each in shapes.items():
            shape = each.shape
            placed[name] = SourceView(
                int(each.expert), dtype, end[each.expert], shape, contiguous_stride(shape)
            )
            end[each.expert] += math.prod(shape) + _GAP
        views.append(placed)
        ends.append(end)
    regions: dict[RankCoordinates, list[Region]] = {}
    owners = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        same = replace(at, context=0, data=0, expert_data=0)
        if same not in regions:
            regions[same] = architecture.trainer_regions(layout, same)
        storages: list[Storage] = [
            SharedStorage((kind, b"%d" % rank, end * item))
            for kind, end in zip((b"dense", b"experts"), ends[at.pipeline], strict=True)
        ]
        host, device = divmod(rank, per_host)
        owners.append(Owner(regions[same], views[at.pipeline], storages, rank, str(host), str(device)))
    return owners


class EngineRanks:
    """Readers of all engine ranks; ranks with the same parameters share regions."""

    def __init__(self, config: PlanConfig, architecture: Architecture, layouts: Layouts) -> None:
        self._config, self._layouts = config, layouts
        self.table = engine_table(architecture, layouts.engine)
        self.item = ITEM_BYTES[config.dtypes.engine]
        self._regions: dict[RankCoordinates, list[Region]] = {}
        self._params: dict[int, dict[str, ParamInfo]] = {}
        self._stage_bytes: dict[int, int] = {}

    def reader(self, rank: int) -> Reader:
        """Return the reader of rank ``rank`` of all engines."""
        layouts, at = self._layouts, self._layouts.engine_coordinates(rank)
        same = replace(at, data=0, expert_data=0)
        if same not in self._regions:
            self._regions[same] = self.table.engine_regions(layouts.engine, same)
        gpu = layouts.first_engine_gpu + rank
        host, device = divmod(gpu, self._config.gpu.gpus_per_host)
        prefer = rank if layouts.colocated else None
        return Reader(self._regions[same], self.params(at.pipeline), str(host), str(device), prefer)

    def params(self, stage: int) -> dict[str, ParamInfo]:
        """Return the parameters of a rank in this pipeline stage."""
        if stage not in self._params:
            at = RankCoordinates(pipeline=stage)
            shapes = stage_shapes(self.table, "engine", self._layouts.engine, at)
            dtype = self._config.dtypes.engine
            self._params[stage] = {name: ParamInfo(each.shape, dtype) for name, each in shapes.items()}
            self._stage_bytes[stage] = num_elements(shapes) * self.item
        return self._params[stage]

    def num_bytes(self, rank: int) -> int:
        """Return the bytes of all parameters of an engine rank."""
        stage = self._layouts.engine_coordinates(rank).pipeline
        self.params(stage)
        return self._stage_bytes[stage]


def plan_traffic(owners: list[Owner], ranks: EngineRanks, num_ranks: int) -> Traffic:
    """Plan every engine rank and sum received and sent bytes."""
    count = _Count(owners, ranks.item)
    readers = [ranks.reader(rank) for rank in range(num_ranks)]
    for reader, plan in zip(readers, Planner(owners).plan_all(readers), strict=True):
        count.add(plan, reader)
    return count.traffic


class _Count:
    """Accumulates the traffic of plans."""

    def __init__(self, owners: list[Owner], item: int) -> None:
        self._owners, self._item = owners, item
        self.traffic = Traffic(sent_nvlink=[0] * len(owners), sent_network=[0] * len(owners))

    def add(self, plan: WeightPlan, reader: Reader) -> None:
        """Add the plan of one engine rank."""
        traffic, item = self.traffic, self._item
        local = nvlink = 0
        sources = [int(storage.handle[1]) for storage in plan.storages if isinstance(storage, SharedStorage)]
        for copy in plan.copies:
            size, source = math.prod(copy.source.shape) * item, sources[copy.source.storage]
            if self._owners[source].device == reader.device:  # same host, since it is mapped
                local += size
            else:
                nvlink += size
                traffic.sent_nvlink[source] += size
        rows = sum(rows * math.prod(reader.params[name].shape[1:]) for name, rows in plan.padding.items())
        traffic.aliased.append(sum(math.prod(alias.source.shape) for alias in plan.aliases) * item)
        traffic.local.append(local)
        traffic.nvlink.append(nvlink)
        traffic.network.append(self._received(plan.peers))
        traffic.padding.append(rows * item)
        traffic.copies.append(len(plan.copies) + len(plan.peers))

    def _received(self, peers: list[PeerCopy]) -> int:
        """Return the bytes of these copies and add them to their senders; millions in a large plan."""
        item, sent, total = self._item, self.traffic.sent_network, 0
        for peer in peers:
            size = peer.size * item
            total += size
            sent[peer.rank] += size
        return total


def seconds(gpu: PlanGpuConfig, *, local: int, nvlink: int, network: int) -> Seconds:
    """Return the durations for the busiest GPU; a local copy reads and writes."""
    return Seconds(
        2 * local / (gpu.memory_gb_s * 1e9),
        nvlink / (gpu.nvlink_gb_s * 1e9),
        network / (gpu.network_gb_s * 1e9),
    )


def plan_seconds(gpu: PlanGpuConfig, traffic: Traffic) -> Seconds:
    """Return the durations of a plan; sending and receiving overlap, so the larger counts."""
    return seconds(
        gpu,
        local=max(traffic.local),
        nvlink=max(*traffic.nvlink, *traffic.sent_nvlink),
        network=max(*traffic.network, *traffic.sent_network),
    )


def gathering(
    config: PlanConfig, architecture: Architecture, owners: list[Owner], engine_bytes: list[int]
) -> Gathering:
    """Return a lower bound of the traffic of gathering, on the busiest GPU.

    A trainer GPU receives all tensors it lacks: those on no GPU of its host over the network, shared among
    the host's GPUs; the rest over NVLink. Engines on separate GPUs receive everything.
    """
    item = ITEM_BYTES[config.dtypes.parameters]
    total = hf_elements(architecture)
    own: dict[int, int] = {}
    on_host: dict[str, set[tuple[str, object]]] = defaultdict(set)
    per_host: dict[str, int] = defaultdict(int)
    for owner in owners:
        boxes = {(region.hf, region.box) for region in owner.regions}
        own[owner.rank] = sum(_volume(box) for _, box in boxes)
        on_host[owner.host] |= boxes
        per_host[owner.host] += 1
    entering = {
        host: (total - sum(_volume(box) for _, box in boxes)) / per_host[host]
        for host, boxes in on_host.items()
    }
    network = max(entering.values())
    nvlink = max(total - own[owner.rank] - entering[owner.host] for owner in owners)
    if config.engine is not None and not config.engine.colocated:
        share = total / min(config.gpu.gpus_per_host, len(engine_bytes))
        network, nvlink = max(network, share), max(nvlink, total - share)
    local = total * item + max(engine_bytes)
    moved = math.ceil(network * item), math.ceil(max(nvlink, 0) * item)
    times = seconds(config.gpu, local=local, nvlink=moved[1], network=moved[0])
    return Gathering(*moved, local, times)


def _volume(box: object) -> int:
    assert isinstance(box, tuple)
    return math.prod(stop - start for start, stop in box)
