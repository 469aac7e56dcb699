"""Weights for an engine whose parameters no table maps: its own loader takes whole tensors, a few at a time.

A plan with ``streamed`` describes the tensors of the Hugging Face checkpoint instead of the engine's
parameters. At each sync they pass, unit by unit, through one buffer (or lie in the trainer's memory already)
into the model's ``load_weights``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megarl.errors import UserError
from megarl.inference.interface import AttachReport
from megarl.inference.weight_receiver import ParamIndex, as_slices, view_of
from megarl.weights.checksum import RegionChecksum, region_checksum
from megarl.weights.peer import PieceReader
from megarl.weights.shared_storage import open_storage
from megarl.weights.sync_plan import Copy, ParamInfo, PeerCopy, SourceView, WeightPlan

UNIT_BYTES = 256 * 2**20
"""Bytes of tensors in the engine's memory at a time; a larger tensor is a unit of its own."""
_ALIGNMENT = 64  # bytes, so that views of any type start well

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


@dataclass(slots=True)
class _Unit:
    """Tensors that are loaded together, and how they get into the buffer."""

    names: list[str]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    received: dict[int, tuple[int, int]] = field(default_factory=dict)  # rank -> pieces [first, stop)


def placeholders(plan: WeightPlan) -> dict[str, torch.Tensor]:
    """Return tensors without memory in the shapes of ``plan.streamed``, to check the plan against."""
    return {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
        for name, info in plan.streamed.items()
    }


class StreamedWeights:
    """A plan with ``streamed`` bound to a model's loader. It must have passed check_plan.

    Args:
        plan: of this engine rank.
        load: the model's ``load_weights``.
        params: the model's parameters, for :meth:`checksums`.
        device: the parameters' device.
        unit_bytes: bound of the buffer.
    """

    def __init__(
        self,
        plan: WeightPlan,
        load: Load,
        params: Mapping[str, torch.Tensor],
        device: torch.device,
        unit_bytes: int = UNIT_BYTES,
    ) -> None:
        self._plan, self._load, self._params = plan, load, params
        self._storages = [open_storage(storage) for storage in plan.storages]
        aliased = {alias.param: view_of(self._storages, alias.source) for alias in plan.aliases}
        sizes = {name: 0 if name in aliased else _bytes(info) for name, info in plan.streamed.items()}
        self._units = [_Unit(names) for names in _groups(sizes, unit_bytes)]
        self.buffer = torch.empty(
            max(sum(_aligned(sizes[name]) for name in unit.names) for unit in self._units),
            dtype=torch.uint8,
            device=device,
        )
        self._tensors = dict(aliased)
        unit_of: dict[str, _Unit] = {}
        for unit in self._units:
            offset = 0
            for name in unit.names:
                unit_of[name] = unit
                if name not in aliased:
                    info, size = plan.streamed[name], sizes[name]
                    part = self.buffer[offset : offset + size].view(getattr(torch, info.dtype))
                    self._tensors[name] = part.view(info.shape)
                    offset += _aligned(size)
        for copy in plan.copies:
            pair = self._part(copy), view_of(self._storages, copy.source)
            unit_of[copy.param].copies.append(pair)
        self._readers = self._connect()

    def _connect(self) -> dict[int, PieceReader]:
        """One reader per sending rank, with its pieces in the order of units."""
        by_tensor: dict[str, list[PeerCopy]] = defaultdict(list)
        for peer in self._plan.peers:
            by_tensor[peer.param].append(peer)
        sent: dict[int, list[tuple[torch.Tensor, SourceView]]] = defaultdict(list)
        for unit in self._units:
            for peer in (each for name in unit.names for each in by_tensor[name]):
                pieces = sent[peer.rank]
                first, _ = unit.received.get(peer.rank, (len(pieces), 0))
                pieces.append((self._part(peer), peer.source))
                unit.received[peer.rank] = (first, len(pieces))
        return {rank: PieceReader(self._plan.addresses[rank], pieces) for rank, pieces in sent.items()}

    def _part(self, copy: Copy | PeerCopy) -> torch.Tensor:
        return self._tensors[copy.param][as_slices(copy)]

    def copy_(self) -> int:
        """Load every tensor as it is now; return the bytes loaded."""
        for unit in self._stream():
            self._load((name, self._tensors[name]) for name in unit.names)
        return self.num_bytes

    @torch.no_grad()
    def _stream(self) -> Iterator[_Unit]:
        """Yield every unit with its tensors in place."""
        for reader in self._readers.values():
            reader.start()
        for unit in self._units:
            for destination, source in unit.copies:
                destination.copy_(source)
            for rank, (first, stop) in unit.received.items():
                self._readers[rank].receive(first, stop)
            yield unit

    def checksums(self) -> list[RegionChecksum]:
        """Return checksums of the plan's regions as they arrive: aliases, copies, peers.

        Raises:
            UserError: loading what arrives changes a parameter, which thus had not been loaded from it.
        """
        written: list[Copy | PeerCopy] = [*self._plan.copies, *self._plan.peers]
        places: list[tuple[str, ParamIndex]] = [
            (alias.param, tuple((0, n) for n in alias.source.shape)) for alias in self._plan.aliases
        ]
        places += [(copy.param, copy.index) for copy in written]
        by_tensor: dict[str, list[int]] = defaultdict(list)
        for number, (name, _) in enumerate(places):
            by_tensor[name].append(number)
        before = {name: region_checksum(param) for name, param in self._params.items()}
        found: dict[int, RegionChecksum] = {}
        for unit in self._stream():
            for name in unit.names:
                tensor = self._tensors[name]
                for number in by_tensor[name]:
                    index = places[number][1]
                    region = tensor[tuple(i if isinstance(i, int) else slice(*i) for i in index)]
                    kind = self._plan.streamed[name].dtype
                    found[number] = RegionChecksum(name, index, kind, region_checksum(region))
            self._load((name, self._tensors[name]) for name in unit.names)
        for name, param in self._params.items():
            if region_checksum(param) != before[name]:
                raise UserError(
                    f"weights.verify: the engine's {name} is not what its loader makes of the weights"
                )
        return [found[number] for number in range(len(places))]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, which each sync hands to the loader."""
        return sum(_bytes(info) for info in self._plan.streamed.values())

    def report(self) -> AttachReport:
        """Report that nothing is aliased: the engine has parameters of its own."""
        received = sum(reader.num_bytes for reader in self._readers.values())
        units = f"{len(self._units)} units of at most {self.buffer.nbytes / 2**20:.1f} MiB of buffer"
        note = (
            f"{len(self._plan.streamed)} tensors ({self.num_bytes / 2**20:.1f} MiB) are loaded by the "
            f"engine's own load_weights at every sync, in {units}: no table maps its parameters"
        )
        return AttachReport([], list(self._plan.streamed), 0, self.num_bytes - received, received, note)


def _groups(sizes: Mapping[str, int], bound: int) -> list[list[str]]:
    """Return names in order, in groups of at most ``bound`` bytes or one tensor."""
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + _aligned(size) > bound:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += _aligned(size)
    return groups


def _bytes(info: ParamInfo) -> int:
    dtype: torch.dtype = getattr(torch, info.dtype)
    return math.prod(info.shape) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
