"""Weight plans applied to plain tensors: the engine ends up with the shards cut by hand."""

from __future__ import annotations

import pytest
import torch

from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.weights.alias import contiguous_stride
from megarl.weights.plan import Owner
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, SharedStorage, SourceView, WeightPlan
from tests.models.test_table import architecture
from tests.weights.plans import plan_weights
from tests.weights.shards import Sizes, Tensors, engine_shard, hf_tensors, trainer_shard


class Trainer:
    """All ranks of a trainer, each with one flat buffer that holds its shard."""

    def __init__(self, sizes: Sizes, layout: ParallelLayout) -> None:
        self.table, self.hf, self.sizes = architecture(sizes), hf_tensors(sizes), sizes
        self.owners: list[Owner] = []
        self.buffers: list[torch.Tensor] = []
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            shard = trainer_shard(self.hf, sizes, layout.tensor, at.tensor, layout.pipeline, at.pipeline)
            views, offset = {}, 0
            for name, tensor in shard.items():
                shape = tuple(tensor.shape)
                views[name] = SourceView(0, "float32", offset, shape, contiguous_stride(shape))
                offset += tensor.numel()
            buffer = torch.cat([tensor.flatten() for tensor in shard.values()])
            storage = SharedStorage((b"", str(rank).encode(), buffer.numel() * 4))
            self.owners.append(Owner(self.table.trainer_regions(layout, at), views, [storage]))
            self.buffers.append(buffer)

    def plan(self, ranks: int, rank: int, dtype: str = "float32") -> tuple[WeightPlan, Tensors]:
        expected = engine_shard(self.hf, self.sizes, ranks, rank)
        params = {name: ParamInfo(tuple(t.shape), dtype) for name, t in expected.items()}
        layout = ParallelLayout(tensor=ranks)
        readers = self.table.engine_regions(layout, layout.coordinates(rank))
        return plan_weights(self.owners, readers, params), expected

    def view(self, plan: WeightPlan, source: SourceView) -> torch.Tensor:
        rank = int(plan.storages[source.storage].handle[1])
        return torch.as_strided(self.buffers[rank], source.shape, source.stride, source.offset)

    def check(self, plan: WeightPlan, expected: Tensors) -> None:
        """Execute the plan, count how often each element is written, and compare."""
        aliased, copied = {a.param for a in plan.aliases}, {c.param for c in plan.copies}
        assert not aliased & copied
        assert aliased | copied == set(expected)
        assert set(plan.copy_reasons) == copied
        params = {a.param: self.view(plan, a.source) for a in plan.aliases}
        counts = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        for copy in plan.copies:
            index = tuple(i if isinstance(i, int) else slice(*i) for i in copy.index)
            param = params.setdefault(copy.param, torch.zeros_like(expected[copy.param]))
            param[index] = self.view(plan, copy.source)
            counts[copy.param][index] += 1
        for name, tensor in expected.items():
            assert torch.equal(params[name], tensor), name
            if name in copied:
                assert torch.equal(counts[name], (tensor != 0).float()), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_same_layout_is_all_aliases(ranks: int, tied: bool) -> None:
    trainer = Trainer(Sizes(tied=tied), ParallelLayout(tensor=ranks))
    for rank in range(ranks):
        plan, expected = trainer.plan(ranks, rank)
        assert plan.copies == []
        assert plan.copy_reasons == {}
        trainer.check(plan, expected)
    trainer.buffers[0].mul_(2)  # an alias follows its owner
    plan, expected = trainer.plan(ranks, 0)
    norm = next(a for a in plan.aliases if a.param == "model.norm.weight")
    assert torch.equal(trainer.view(plan, norm.source), expected["model.norm.weight"] * 2)


def test_pipeline_stages_alias_into_one_engine_rank() -> None:
    """Every parameter is whole on some stage: nothing needs a copy, though two ranks are read."""
    trainer = Trainer(Sizes(tied=True), ParallelLayout(pipeline=2))
    plan, expected = trainer.plan(1, 0)
    assert plan.copies == []
    assert {a.source.storage for a in plan.aliases} == {0, 1}
    trainer.check(plan, expected)


def test_data_parallel_replicas_are_read_once() -> None:
    trainer = Trainer(Sizes(), ParallelLayout(data=2))
    plan, expected = trainer.plan(1, 0)
    trainer.check(plan, expected)
    assert {a.source.storage for a in plan.aliases} == {0}


SPLIT = (
    "embed_tokens.weight",
    "lm_head.weight",
    "qkv_proj.weight",
    "qkv_proj.bias",
    "o_proj.weight",
    "gate_up_proj.weight",
    "gate_up_proj.bias",
    "down_proj.weight",
)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_two_tensor_ranks_into_one_engine_rank(pipeline: int) -> None:
    trainer = Trainer(Sizes(), ParallelLayout(tensor=2, pipeline=pipeline))
    plan, expected = trainer.plan(1, 0)
    trainer.check(plan, expected)
    assert set(plan.copy_reasons) == {name for name in expected if name.endswith(SPLIT)}
    assert set(plan.copy_reasons.values()) == {"its parts lie with several trainer ranks or parameters"}


def test_one_tensor_rank_into_two_engine_ranks() -> None:
    trainer = Trainer(Sizes(), ParallelLayout())
    for rank in range(2):
        plan, expected = trainer.plan(2, rank)
        trainer.check(plan, expected)
        # Rows of one tensor stay adjacent; columns and fused parts do not.
        fused = {n: "its parts are fused in another order in the trainer" for n in expected if "gate_up" in n}
        fused |= {n: "its parts are fused in another order in the trainer" for n in expected if "qkv" in n}
        columns = [n for n in expected if n.endswith(("o_proj.weight", "down_proj.weight"))]
        assert plan.copy_reasons == fused | dict.fromkeys(
            columns, "its rows are laid out differently in the trainer"
        )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_kv_heads_are_replicated_on_four_engine_ranks(kv_heads: int) -> None:
    trainer = Trainer(Sizes(kv_heads=kv_heads), ParallelLayout(tensor=kv_heads, pipeline=2))
    for rank in range(4):
        trainer.check(*trainer.plan(4, rank))


def test_another_dtype_is_copied_and_says_so() -> None:
    trainer = Trainer(Sizes(layers=1), ParallelLayout())
    plan, expected = trainer.plan(1, 0, dtype="bfloat16")
    assert plan.aliases == []
    assert plan.copy_reasons == dict.fromkeys(expected, "the trainer stores float32, the engine bfloat16")
    trainer.check(plan, expected)


def test_padding_beyond_the_trainers_memory_is_not_aliased() -> None:
    """The engine pads more than the trainer, and the embedding is the last thing in the buffer."""
    sizes = Sizes(layers=1)
    trainer = Trainer(sizes, ParallelLayout())
    [owner] = trainer.owners
    name = "embedding.word_embeddings.weight"
    rows = SourceView(0, "float32", 0, (256, sizes.hidden), (sizes.hidden, 1))
    alone = Owner(
        [r for r in owner.regions if r.param == name], {name: rows}, [SharedStorage((b"", b"", 256 * 64))]
    )
    readers = trainer.table.engine_regions(ParallelLayout(), ParallelLayout().coordinates(0))
    readers = [r for r in readers if r.param == "model.embed_tokens.weight"]
    wide = plan_weights([alone], readers, {"model.embed_tokens.weight": ParamInfo((320, 16), "float32")})
    assert wide.copy_reasons == {
        "model.embed_tokens.weight": "the trainer's memory block ends before the engine's padding does"
    }
    same = plan_weights([alone], readers, {"model.embed_tokens.weight": ParamInfo((256, 16), "float32")})
    assert same.aliases == [Alias("model.embed_tokens.weight", rows)]


def test_everything_that_does_not_fit_is_listed_in_one_error() -> None:
    trainer = Trainer(Sizes(layers=1), ParallelLayout())
    [owner] = trainer.owners
    orphan = "model.layers.0.self_attn.o_proj.weight"
    owner.regions[:] = [region for region in owner.regions if region.hf != orphan]
    expected = engine_shard(trainer.hf, trainer.sizes, 1, 0)
    params = {name: ParamInfo(tuple(t.shape), "float32") for name, t in expected.items()}
    del params["model.norm.weight"]
    params["visual.patch.weight"] = ParamInfo((3, 5), "float32")
    params["model.layers.0.mlp.down_proj.bias"] = ParamInfo((12,), "float32")
    params["model.layers.0.mlp.down_proj.weight"] = ParamInfo((20, 24), "float32")
    readers = trainer.table.engine_regions(ParallelLayout(), ParallelLayout().coordinates(0))
    with pytest.raises(UserError) as caught:
        plan_weights(trainer.owners, readers, params)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for words in (
        ["no parameter model.norm.weight"],
        ["no trainer rank owns", orphan],
        ["0 of 384 elements", orphan],
        ["0 of 15 elements", "visual.patch.weight"],
        ["down_proj.bias [12] does not reach"],
        ["384 of 480 elements", "down_proj.weight"],
    ):
        assert sum(all(word in line for word in words) for line in lines) == 1, (words, lines)


def test_an_int_in_the_index_picks_one_expert() -> None:
    """Experts are stacked: one HF tensor is one row of the parameter on both sides."""
    from megarl.models.table import Region

    owner = Owner(
        [Region(f"expert.{e}", ((0, 2), (0, 3)), "stacked", (e, (0, 2), (0, 3))) for e in range(4)],
        {"stacked": SourceView(0, "float32", 5, (4, 2, 3), (6, 3, 1))},
        [SharedStorage((b"", b"", 4 * 64))],
    )
    readers = [Region(f"expert.{e}", ((0, 2), (1, 3)), "w2", (e - 2, (0, 2), (0, 2))) for e in (2, 3)]
    plan = plan_weights([owner], readers, {"w2": ParamInfo((2, 2, 2), "float32")})
    view = SourceView(0, "float32", 5 + 12 + 1, (2, 2, 2), (6, 3, 1))  # neighbours are one copy
    assert plan.copies == [Copy("w2", ((0, 2), (0, 2), (0, 2)), view)]
    far = [readers[0], Region("expert.0", ((0, 2), (1, 3)), "w2", (1, (0, 2), (0, 2)))]
    plan = plan_weights([owner], far, {"w2": ParamInfo((2, 2, 2), "float32")})
    assert plan.copies == [
        Copy("w2", ((0, 1), (0, 2), (0, 2)), SourceView(0, "float32", 5 + 12 + 1, (1, 2, 2), (6, 3, 1))),
        Copy("w2", ((1, 2), (0, 2), (0, 2)), SourceView(0, "float32", 5 + 1, (1, 2, 2), (6, 3, 1))),
    ]
