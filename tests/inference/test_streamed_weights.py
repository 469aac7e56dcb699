"""Weights through an engine's own loader: every tensor is the trainers', in bounded memory, at every sync."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.errors import UserError
from megarl.inference.streamed_weights import StreamedWeights, placeholders
from megarl.inference.weight_receiver import check_plan
from megarl.models.table import Region
from megarl.weights.checksum import region_checksum
from megarl.weights.peer import PieceServer
from megarl.weights.plan import Owner
from megarl.weights.shared_storage import pool_parameters, share_parameters, storages_of
from megarl.weights.sync_plan import ParamInfo, WeightPlan
from tests.weights.plans import plan_weights

SHAPES = {"embed": (250, 16), "qkv": (48, 16), "bias": (48,), "down": (16, 40), "norm": (16,)}
BOUND = 4096  # bytes: "embed" alone is larger


class Half:
    """One of two trainer ranks: rows of every tensor; each has "bias" and "norm" whole."""

    def __init__(self, number: int, served: bool) -> None:
        self.tensors, self.regions = {}, []
        for name, shape in SHAPES.items():
            middle = shape[0] // 2
            start, stop = (0, shape[0]) if len(shape) == 1 else ((0, middle), (middle, shape[0]))[number]
            rest = tuple((0, size) for size in shape[1:])
            self.tensors[name] = torch.nn.Parameter(torch.zeros(stop - start, *shape[1:]))
            index = ((0, stop - start), *rest)
            self.regions.append(Region(name, ((start, stop), *rest), name, index))
        pool_parameters(self.tensors)
        self.owner: Owner = replace(share_parameters(self.tensors, self.regions), rank=number)
        self.server = None
        if served:
            self.server = PieceServer(storages_of(self.tensors), torch.device("cpu"), "127.0.0.1")
            self.owner = replace(self.owner, address=self.server.address)

    @torch.no_grad()
    def set(self, whole: dict[str, torch.Tensor]) -> None:
        for region in self.regions:
            self.tensors[region.param].copy_(whole[region.hf][tuple(slice(*span) for span in region.box)])


class Model:
    """Has the tensors fused in one parameter, transposed: no region of a tensor is one of its own."""

    def __init__(self) -> None:
        self.flat = torch.zeros(sum(torch.Size(shape).numel() for shape in SHAPES.values()))
        self.units: list[list[str]] = []
        self.ignores = ""

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.units.append([])
        for name, tensor in tensors:
            self.units[-1].append(name)
            start = sum(torch.Size(SHAPES[n]).numel() for n in list(SHAPES)[: list(SHAPES).index(name)])
            if name != self.ignores:
                self.flat[start : start + tensor.numel()] = tensor.t().flatten()


def values(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def flat(whole: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.t().flatten() for tensor in whole.values()])


@pytest.fixture(params=["mapped", "peers"])
def halves(request: pytest.FixtureRequest) -> tuple[list[Half], WeightPlan]:
    peers = request.param == "peers"
    found = [Half(number, peers) for number in range(2)]
    tensors = {name: ParamInfo(shape, "float32") for name, shape in SHAPES.items()}
    boxes = {name: tuple((0, size) for size in shape) for name, shape in SHAPES.items()}
    regions = [Region(name, box, name, box) for name, box in boxes.items()]
    owners = [half.owner for half in found]
    plan = plan_weights(owners, regions, tensors, host=owners[0].host, device="cpu", peers_only=peers)
    return found, replace(plan, streamed=tensors)


def test_every_sync_loads_the_trainers_tensors(halves: tuple[list[Half], WeightPlan]) -> None:
    owners, plan = halves
    model = Model()
    assert check_plan(plan, placeholders(plan)) == []
    params = {"flat": model.flat}
    weights = StreamedWeights(plan, model.load_weights, params, torch.device("cpu"), BOUND)
    for sync in range(10):
        whole = values(sync)
        for half in owners:
            half.set(whole)
        assert weights.copy_() == 4 * sum(tensor.numel() for tensor in whole.values())
        assert torch.equal(model.flat, flat(whole)), sync
    assert [name for unit in model.units[: len(model.units) // 10] for name in unit] == list(SHAPES)
    assert len(model.units) > 20 and weights.buffer.nbytes <= 250 * 16 * 4 + 64
    report = weights.report()
    assert "load_weights" in report.note and f"{weights.num_bytes / 2**20:.1f} MiB" in report.note
    assert (report.received_bytes > 0) == bool(plan.peers) and not report.aliased
    sums = weights.checksums()
    where: list[Any] = [*plan.aliases, *plan.copies, *plan.peers]
    for each, found in zip(where, sums, strict=True):
        index = tuple(slice(*span) for span in found.index)
        assert found.param == each.param
        assert found.value == region_checksum(whole[each.param][index])


def test_a_loader_that_leaves_something_out_is_found(halves: tuple[list[Half], WeightPlan]) -> None:
    owners, plan = halves
    model = Model()
    model.ignores = "qkv"
    weights = StreamedWeights(plan, model.load_weights, {"flat": model.flat}, torch.device("cpu"), BOUND)
    weights.copy_()
    model.ignores = ""
    for half in owners:
        half.set(values(1))
    with pytest.raises(UserError, match=r"weights\.verify: the engine's flat"):
        weights.checksums()
