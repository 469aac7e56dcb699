"""A trainer rank's weights for others: owners for engines, checksums, Hugging Face tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from megarl.cluster.collectives import (
    gather,
    gather_to_first_rank,
    receive,
    send_to_first_rank,
    wait_for_devices,
)
from megarl.models.table import Architecture, Region
from megarl.trainer.interface import RankContext, Transport
from megarl.weights.checksum import RegionQuery, region_checksum
from megarl.weights.hf import region_index
from megarl.weights.memory_domain import address_towards
from megarl.weights.peer import PieceServer
from megarl.weights.plan import Owner
from megarl.weights.shared_storage import share_parameters, storages_of


class Adapters(Protocol):
    """Low-rank adapters of one rank's model, for readers of its weights."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every whole A and B, by PEFT's names."""
        ...

    def publish(self) -> None:
        """Write merged weights for engines: a copy of the adapted layers, allocated at the first call."""
        ...

    def refresh(self) -> None:
        """Update published weights, if any."""
        ...

    def merged_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the parameters with adapters merged in: the published ones, or computed on access."""
        ...

    def adapter_tensors(self) -> tuple[Mapping[str, torch.Tensor], list[Region]]:
        """Return this rank's parts of all A and B by name, and their regions."""
        ...


class TrainerWeights:
    """Implements :class:`megarl.trainer.interface.Weights`: one rank's parameters and their regions.

    Args:
        context: this rank.
        architecture: the model.
        params: the model's parameters.
        regions: regions of the Hugging Face tensors that ``params`` hold.
        lora: the adapters, if any; engines and exports then get merged weights.
        finish_step: completes the last optimizer step's parameters on this rank.
        speaks_for: returns True if this rank is the first of those with the same values of a parameter.
    """

    def __init__(
        self,
        context: RankContext,
        architecture: Architecture,
        params: Mapping[str, torch.Tensor],
        regions: list[Region],
        lora: Adapters | None,
        finish_step: Callable[[], None],
        speaks_for: Callable[[str], bool],
    ) -> None:
        self._context, self._architecture, self._regions = context, architecture, regions
        self._lora, self._finish_step, self._speaks_for = lora, finish_step, speaks_for
        self._params = params if lora is None else lora.merged_weights()
        self._server: PieceServer | None = None
        self._offered: Owner | None = None

    def owners(self, transport: Transport = "auto") -> list[Owner]:
        """See Weights. Starts a server if an engine may request weights.

        Every rank lists all it holds; the planner chooses among replicas.
        """
        self._finish_step()
        if self._lora is not None:
            self._lora.publish()
        if self._offered is None:  # shared once: a GPU's memory gets another handle at each request
            self._offered = share_parameters(self._params, self._regions, mapped=transport != "peer")
        mine = self._offered
        several_hosts = len(set(gather(mine.host))) > 1
        if self._server is None and (transport == "peer" or (transport == "auto" and several_hosts)):
            device = next(iter(self._params.values())).device
            self._server = PieceServer(storages_of(self._params), device, _own_address())
        address = self._server.address if self._server is not None else ""
        owners = gather(replace(mine, rank=self._context.rank, address=address))
        wait_for_devices()
        return owners if self._context.is_first else []

    def publish(self) -> None:
        """See Weights."""
        self._finish_step()
        if self._lora is not None:
            self._lora.refresh()
        wait_for_devices()

    def checksums(self, queries: Sequence[RegionQuery]) -> dict[int, int]:
        """See Weights."""
        assert self._offered is not None, "call owners before checksums"
        self._finish_step()
        storages = storages_of(self._params)
        number_of = {storage: number for number, storage in enumerate(self._offered.storages)}
        sums = {}
        for index, query in enumerate(queries):
            number = query.source.storage if query.rank == self._context.rank else None
            if query.storage is not None:
                number = number_of.get(query.storage)
            if number is not None:
                view = query.source
                empty = torch.empty(0, dtype=getattr(torch, view.dtype), device=storages[number].device)
                tensor = empty.set_(storages[number], view.offset, view.shape, view.stride)
                sums[index] = region_checksum(tensor, query.dtype)
        return sums

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Weights. One whole tensor at a time is on rank 0."""
        self.publish()
        shapes = self._architecture.hf_shapes()
        return gather_tensors(self._context, shapes, self._regions, self._params, self._speaks_for)

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Weights."""
        assert self._lora is not None, "only a model with lora has adapters"
        self._finish_step()
        params, regions = self._lora.adapter_tensors()
        return gather_tensors(self._context, self._lora.shapes, regions, params, self._speaks_for)


def gather_tensors(
    context: RankContext,
    shapes: Mapping[str, tuple[int, ...]],
    regions: list[Region],
    params: Mapping[str, torch.Tensor],
    speaks_for: Callable[[str], bool],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of ``shapes`` on rank 0 (elsewhere none), assembled from the ranks' ``regions``.

    Among ranks with the same values, the one that ``speaks_for`` a parameter sends them. Rank 0 holds one
    whole tensor and one piece of it at a time, other ranks one piece.
    """
    mine: dict[str, list[Region]] = {}
    for region in regions:
        if speaks_for(region.param):
            mine.setdefault(region.hf, []).append(region)
    outline = {
        name: [(region.box, params[region.param].dtype) for region in held] for name, held in mine.items()
    }
    outlines = gather_to_first_rank(outline)

    def pieces(name: str) -> Iterator[torch.Tensor]:
        for region in mine.get(name, []):
            yield params[region.param].detach()[region_index(region.index)].cpu()

    for name, shape in shapes.items():
        if not context.is_first:
            for piece in pieces(name):
                send_to_first_rank(piece)
            continue
        held = [(rank, box, dtype) for rank, of in enumerate(outlines) for box, dtype in of.get(name, [])]
        whole = torch.empty(shape, dtype=held[0][2])
        own = pieces(name)
        for rank, box, dtype in held:
            size = tuple(stop - start for start, stop in box)
            piece = next(own) if rank == context.rank else receive(rank, size, dtype)
            whole[tuple(slice(*span) for span in box)] = piece.reshape(size)
        yield name, whole


def _own_address() -> str:
    """Return this rank's address on the route to rank 0."""
    return address_towards(os.environ.get("MASTER_ADDR") or "127.0.0.1")
