"""Plans between many layouts, executed on plain tensors: experts, model chunks, uneven stages, hosts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models.dense import attention, dense_mlp, ends
from megarl.models.moe import moe_mlp
from megarl.models.spec import MoeSpec
from megarl.models.table import Architecture, Region
from megarl.weights.alias import contiguous_stride
from megarl.weights.boxes import tiling_problem, volume
from megarl.weights.plan import Owner, Planner, Reader
from megarl.weights.sync_plan import ParamInfo, SharedStorage, SourceView, WeightPlan
from tests.models.test_table import architecture
from tests.weights.plans import plan_weights
from tests.weights.shards import ExpertShare, Sizes, Tensors, engine_shard, hf_tensors, stage_shard

DENSE = Sizes(tied=True)
EXPERTS = Sizes(experts=4, layers=4)


def table_of(sizes: Sizes) -> Architecture:
    if not sizes.experts:
        return architecture(sizes)
    moe = MoeSpec(sizes.experts, 2, sizes.expert_inner, tuple(range(1, sizes.layers)))
    spec = replace(architecture(sizes).spec, moe=moe)
    return Architecture(spec, (*ends(spec), *attention(spec), *dense_mlp(spec), *moe_mlp(spec)))


@dataclass(frozen=True)
class Ranks:
    """One side's sizes; the shard of each rank is computed here, not by ParallelLayout."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    chunks: tuple[tuple[tuple[int, ...], ...], ...] = (((0, 1, 2, 3),),)  # [stage][chunk] -> layers
    first: int | None = None
    last: int | None = None

    def layout(self) -> ParallelLayout:
        return ParallelLayout(
            tensor=self.tp,
            pipeline=self.pp,
            data=self.dp,
            virtual=len(self.chunks[0]),
            expert=self.ep,
            expert_tensor=self.etp,
            first_stage_layers=self.first,
            last_stage_layers=self.last,
        )

    def share(self, rank: int) -> ExpertShare:
        in_stage = rank % (self.tp * self.dp)
        return ExpertShare((self.ep, in_stage // self.etp % self.ep), (self.etp, in_stage % self.etp))

    def trainer_shard(self, hf: Tensors, sizes: Sizes, rank: int) -> Tensors:
        stage, chunks, out = rank // (self.tp * self.dp), len(self.chunks[0]), {}
        for chunk, layers in enumerate(self.chunks[stage]):
            shard = stage_shard(
                hf,
                sizes,
                self.tp,
                rank % self.tp,
                list(layers),
                first=stage == 0 and chunk == 0,
                last=stage == self.pp - 1 and chunk == chunks - 1,
                share=self.share(rank),
            )
            prefix = f"chunk{chunk}." if chunks > 1 else ""
            out |= {prefix + name: tensor for name, tensor in shard.items()}
        return out


ONE = Ranks()
TRAINERS = {
    "one": ONE,
    "ep2": Ranks(dp=2, ep=2),
    "tp2xep2": Ranks(tp=2, ep=2),
    "tp2xdp2xep4": Ranks(tp=2, dp=2, ep=4),
    "etp2": Ranks(tp=2, etp=2),
    "dp2": Ranks(dp=2),
    "ep2xetp2xdp4": Ranks(dp=4, ep=2, etp=2),
    "pp2": Ranks(pp=2, chunks=(((0, 1),), ((2, 3),))),
    "pp2xvpp2": Ranks(tp=2, pp=2, chunks=(((0,), (2,)), ((1,), (3,)))),
    "uneven": Ranks(pp=3, chunks=(((0,),), ((1, 2),), ((3,),)), first=1, last=1),
    "uneven2": Ranks(pp=2, dp=2, ep=2, chunks=(((0, 1, 2),), ((3,),)), last=1),
}
ENGINES = {
    "tp1": ONE,
    "tp2": Ranks(tp=2, etp=2),
    "ep2": Ranks(dp=2, ep=2),
    "tp2xep2": Ranks(tp=2, ep=2),
}


class Trainer:
    """All ranks of a trainer; each has two buffers (as Megatron's dense and expert ones), with gaps."""

    def __init__(self, sizes: Sizes, ranks: Ranks, hosts: list[str] | None = None, dtype: str = "float32"):
        self.table, self.hf, self.sizes = table_of(sizes), hf_tensors(sizes), sizes
        layout = ranks.layout()
        self.owners: list[Owner] = []
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        for rank in range(layout.world_size):
            views = self._buffers(rank, ranks.trainer_shard(self.hf, sizes, rank), dtype)
            regions = self.table.trainer_regions(layout, layout.coordinates(rank))
            storages = [
                SharedStorage((b"", b"%d %d" % (rank, n), self.buffers[rank, n].nbytes)) for n in range(2)
            ]
            host = hosts[rank] if hosts else ""
            self.owners.append(Owner(regions, views, storages, rank, host))

    def _buffers(self, rank: int, shard: Tensors, dtype: str) -> dict[str, SourceView]:
        views, ends, parts = {}, [3, 5], [[torch.zeros(3)], [torch.zeros(5)]]
        for name, tensor in shard.items():
            number, shape = int("experts" in name), tuple(tensor.shape)
            views[name] = SourceView(number, dtype, ends[number], shape, contiguous_stride(shape))
            parts[number] += [tensor.flatten(), torch.zeros(7)]
            ends[number] += tensor.numel() + 7
        for number in range(2):
            self.buffers[rank, number] = torch.cat(parts[number]).to(getattr(torch, dtype))
        return views

    def reader(
        self, engine: Ranks, rank: int, dtype: str = "float32", host: str = ""
    ) -> tuple[Reader, Tensors]:
        expected = engine_shard(self.hf, self.sizes, engine.tp, rank % engine.tp, engine.share(rank))
        params = {name: ParamInfo(tuple(t.shape), dtype) for name, t in expected.items()}
        layout = engine.layout()
        regions = self.table.engine_regions(layout, layout.coordinates(rank))
        return Reader(regions, params, host=host), expected

    def _view(self, rank: int, source: SourceView) -> torch.Tensor:
        buffer = self.buffers[rank, source.storage]
        return torch.as_strided(buffer, source.shape, source.stride, source.offset)

    def carry_out(self, plan: WeightPlan, expected: Tensors) -> None:
        """Check that every element of every parameter is written once, as in the hand-cut shard."""
        got = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        counts = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}

        def write(param: str, index: tuple[int | tuple[int, int], ...], value: torch.Tensor) -> None:
            place = tuple(i if isinstance(i, int) else slice(*i) for i in index)
            assert got[param][place].shape == value.shape
            got[param][place] = value.float()
            counts[param][place] += 1

        names = [storage.handle[1].split() for storage in plan.storages]
        assert len({tuple(name) for name in names}) == len(names), "one handle per buffer"
        used = {a.source.storage for a in plan.aliases} | {c.source.storage for c in plan.copies}
        assert used == set(range(len(names))), "only what is used"
        for entry in [*plan.aliases, *plan.copies]:
            rank, number = map(int, names[entry.source.storage])
            index = getattr(entry, "index", tuple((0, n) for n in expected[entry.param].shape))
            value = self._view(rank, replace(entry.source, storage=number))
            write(entry.param, index, value)
        for peer in plan.peers:
            write(peer.param, peer.index, self._view(peer.rank, peer.source))
        aliased = {alias.param for alias in plan.aliases}
        assert set(plan.copy_reasons) == set(expected) - aliased
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
            real = torch.ones_like(tensor) if name in aliased else (tensor != 0).float()
            assert torch.equal(counts[name], real), name
            padding = int((tensor == 0).all(-1).sum()) if tensor.dim() == 2 else 0
            assert plan.padding.get(name, 0) == (0 if name in aliased else padding), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_experts_between_layouts(trainer: str, engine: str) -> None:
    bench = Trainer(EXPERTS, TRAINERS[trainer])
    for rank in range(ENGINES[engine].layout().world_size):
        reader, expected = bench.reader(ENGINES[engine], rank)
        bench.carry_out(plan_weights(bench.owners, reader.regions, reader.params), expected)
        peers = plan_weights(bench.owners, reader.regions, reader.params, peers_only=True)
        assert not peers.aliases
        assert not peers.copies
        bench.carry_out(peers, expected)


@pytest.mark.parametrize("trainer", ["one", "dp2", "pp2xvpp2", "uneven", "pp2"])
def test_dense_between_layouts(trainer: str) -> None:
    bench = Trainer(DENSE, TRAINERS[trainer])
    for rank in range(2):
        reader, expected = bench.reader(ENGINES["tp2"], rank)
        bench.carry_out(plan_weights(bench.owners, reader.regions, reader.params), expected)


@pytest.mark.parametrize("name", ["tp2xep2", "ep2"])
def test_equal_expert_layouts_are_aliases(name: str) -> None:
    bench = Trainer(EXPERTS, TRAINERS[name])
    for rank in range(2):
        reader, expected = bench.reader(ENGINES[name], rank)
        plan = plan_weights(bench.owners, reader.regions, reader.params)
        assert plan.copy_reasons == {}
        bench.carry_out(plan, expected)


def test_all_experts_of_a_rank_are_one_copy() -> None:
    """ep2 -> tp1: of each of three layers two halves of w13 and two of w2."""
    bench = Trainer(EXPERTS, TRAINERS["ep2"])
    reader, _ = bench.reader(ONE, 0)
    plan = plan_weights(bench.owners, reader.regions, reader.params)
    assert len(plan.copies) == 3 * 4
    assert {copy.source.shape for copy in plan.copies} == {(2, 16, 16), (2, 16, 8)}


def test_owners_elsewhere_are_peers_and_dtypes_convert() -> None:
    bench = Trainer(EXPERTS, TRAINERS["tp2xdp2xep4"], hosts=["a", "b", "a", "b"], dtype="bfloat16")
    reader, _ = bench.reader(ONE, 0, host="a")
    bench.buffers = {key: buffer.zero_().add_(3) for key, buffer in bench.buffers.items()}
    plan = plan_weights(bench.owners, reader.regions, reader.params, host="a")
    assert {peer.rank for peer in plan.peers} == {1, 3}
    assert {int(s.handle[1].split()[0]) for s in plan.storages} == {0, 2}
    assert not plan.aliases, "the engine wants float32"
    local = {copy.param for copy in plan.copies}
    replicated = {name for name in reader.params if name.endswith(("norm.weight", "mlp.gate.weight"))}
    assert replicated <= local, "what the host has is not sent over the network"
    assert not replicated & {peer.param for peer in plan.peers}


def test_the_device_decides_what_can_be_aliased() -> None:
    """Two ranks of one host with a device each: only the neighbour on the same device is aliased."""
    bench = Trainer(EXPERTS, TRAINERS["dp2"])
    owners = [replace(owner, device=f"cuda:{owner.rank}") for owner in bench.owners]
    reader, expected = bench.reader(ONE, 0)
    for device, rank in (("cuda:0", 0), ("cuda:1", 1)):
        plan = plan_weights(owners, reader.regions, reader.params, device=device, prefer_rank=rank)
        bench.carry_out(plan, expected)
        assert not plan.copy_reasons
        assert {storage.handle[1].split()[0] for storage in plan.storages} == {b"%d" % rank}
    plan = plan_weights(owners, reader.regions, reader.params, device="cuda:2")
    bench.carry_out(plan, expected)
    assert set(plan.copy_reasons.values()) == {"no trainer rank has it in memory the engine could alias"}


def test_replicas_share_the_sending() -> None:
    """Eight replicas feed 16 engine ranks elsewhere: no two differ by more than the largest parameter."""
    bench = Trainer(DENSE, Ranks(dp=8))
    reader, _ = bench.reader(ONE, 0, host="elsewhere")
    planner = Planner(bench.owners)
    sent: Counter[int] = Counter()
    plans = [planner.plan(reader) for _ in range(16)]
    for plan in plans:
        assert len({peer.param for peer in plan.peers}) == len(reader.params)
        for peer in plan.peers:
            sent[peer.rank] += 4 * torch.Size(peer.source.shape).numel()
    assert len(sent) == 8
    assert max(sent.values()) - min(sent.values()) <= 250 * 16 * 4, "the embedding"
    again = Planner(bench.owners)
    assert [again.plan(reader) for _ in range(16)] == plans


def test_choices_know_what_only_one_rank_can_send_later() -> None:
    """Both ranks have x, the first alone has y: planned together, x comes from the second."""
    whole = ((0, 4),)
    x, y = Region("x", whole, "x", whole), Region("y", whole, "y", whole)
    view, storage = SourceView(0, "float32", 0, (4,), (1,)), SharedStorage((b"", b"", 16))
    owners = [
        Owner([x, y], {"x": view, "y": view}, [storage], 0),
        Owner([x], {"x": view}, [storage], 1),
    ]
    info = ParamInfo((4,), "float32")
    readers = [Reader([each], {each.param: info}, host="elsewhere") for each in (x, y)]
    planner = Planner(owners)
    assert [planner.plan(reader).peers[0].rank for reader in readers] == [0, 0]
    assert [plan.peers[0].rank for plan in Planner(owners).plan_all(readers)] == [1, 0]


def test_a_parameter_comes_from_as_few_ranks_as_possible() -> None:
    """Experts {0,1} lie with ranks 0 and 2, {2,3} with 1 and 2: rank 2 alone sends the parameter."""
    bench = Trainer(EXPERTS, ONE)
    [whole] = bench.owners
    name = "decoder.layers.1.mlp.experts.w13"
    pieces = [
        [r for r in whole.regions if r.param == name and r.index[0] in experts]
        for experts in ((0, 1), (2, 3), (0, 1, 2, 3))
    ]
    owners = [
        Owner(regions, {name: whole.params[name]}, whole.storages, rank)
        for rank, regions in enumerate(pieces)
    ]
    reader, _ = bench.reader(ONE, 0)
    target = "model.layers.1.mlp.experts.routed_experts.w13_weight"
    regions = [r for r in reader.regions if r.param == target]
    plan = plan_weights(owners, regions, {target: reader.params[target]}, host="elsewhere")
    assert {peer.rank for peer in plan.peers} == {2}


def test_plans_depend_on_values_and_share_what_is_the_same() -> None:
    """Equal arguments give equal plans; engine ranks elsewhere are sent the very same copies."""
    bench = Trainer(DENSE, ONE)
    reader, _ = bench.reader(ONE, 0)
    plan = plan_weights(bench.owners, reader.regions, reader.params)
    copy = [replace(owner, params=dict(owner.params)) for owner in bench.owners]
    assert plan_weights(copy, list(reader.regions), dict(reader.params)) == plan
    moved = [replace(owner, storages=[SharedStorage((b"", b"0 9", 8 * 2**20))] * 2) for owner in copy]
    assert plan_weights(moved, reader.regions, reader.params) != plan
    far = replace(reader, host="elsewhere")
    first, second = Planner(bench.owners).plan_all([far, far])
    assert len(first.peers) >= len(reader.params)
    assert all(one is other for one, other in zip(first.peers, second.peers, strict=True))
    assert all(peer.size == torch.Size(peer.source.shape).numel() for peer in first.peers)


def test_elements_written_twice_or_never_are_an_error() -> None:
    """Counting alone would not see it: as many elements are written as there are."""
    bench = Trainer(DENSE, ONE)
    reader, _ = bench.reader(ONE, 0)
    name = "model.layers.0.self_attn.o_proj.weight"
    [whole] = [r for r in reader.regions if r.param == name]
    (rows, columns) = whole.box
    top = ((0, rows[1] // 2), columns)
    halves = [replace(whole, box=top, index=top)] * 2
    regions = [r for r in reader.regions if r.param != name] + halves
    with pytest.raises(UserError, match=r"384 of 384 elements of engine parameter .*o_proj.weight"):
        plan_weights(bench.owners, regions, reader.params)


def test_only_trailing_vocabulary_rows_are_padding() -> None:
    bench = Trainer(DENSE, ONE)
    reader, _ = bench.reader(ONE, 0)
    name = "model.embed_tokens.weight"
    [embedding] = [r for r in reader.regions if r.param == name]
    short = replace(embedding, box=((0, 240), (0, 16)), index=((0, 240), (0, 16)))
    late = replace(embedding, index=((6, 256), (0, 16)))
    for wrong in (short, late):
        regions = [wrong if r.param == name else r for r in reader.regions]
        with pytest.raises(UserError, match=name):
            plan_weights(bench.owners, regions, reader.params)


def test_tiling_against_counting_cells() -> None:
    """Random boxes in a small space, a third of them true tilings: the proof says what counting says."""
    draw = random.Random(5)
    verdicts: Counter[bool] = Counter()
    for _ in range(600):
        shape = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))]
        boxes = [tuple((0, n) for n in shape)]
        for _ in range(draw.randint(0, 5)):  # split a random box: stays a tiling
            box = boxes.pop(draw.randrange(len(boxes)))
            dim = draw.randrange(len(shape))
            start, stop = box[dim]
            cut = draw.randint(start + 1, stop - 1) if stop - start > 1 else stop
            parts = [(start, cut), (cut, stop)]
            boxes += [(*box[:dim], part, *box[dim + 1 :]) for part in parts if part[0] < part[1]]
        spoil = draw.randrange(3)
        if spoil == 1:
            boxes.pop()
        elif spoil == 2:
            boxes[-1] = boxes[draw.randrange(len(boxes))]
        draw.shuffle(boxes)
        counts = torch.zeros(shape)
        for box in boxes:
            counts[tuple(slice(*span) for span in box)] += 1
        good = bool((counts == 1).all())
        verdicts[good] += 1
        assert (tiling_problem(tuple((0, n) for n in shape), tuple(boxes)) is None) == good
    assert min(verdicts.values()) > 100


def test_a_pinwheel_is_a_tiling() -> None:
    """No cut separates these five boxes."""
    boxes = (((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2)))
    whole = ((0, 3), (0, 3))
    assert sum(map(volume, boxes)) == 9
    assert tiling_problem(whole, boxes) is None
    assert tiling_problem(whole, boxes[:4]) is not None
