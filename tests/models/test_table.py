"""The tables against shards cut by hand: every element of every parameter comes from the right tensor."""

from __future__ import annotations

import pytest
import torch

from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec, RopeSpec
from megarl.models.table import Architecture, Region, Slot, name_problems
from tests.weights.shards import Sizes, Tensors, engine_shard, hf_tensors, trainer_shard


def architecture(sizes: Sizes) -> Architecture:
    return dense_architecture(
        ModelSpec(
            family="qwen3",
            num_layers=sizes.layers,
            hidden_size=sizes.hidden,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            intermediate_size=sizes.inner,
            vocab_size=sizes.vocab,
            max_position_embeddings=64,
            norm_eps=1e-6,
            rope=RopeSpec(10_000.0),
            tied_embeddings=sizes.tied,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            qk_norm=True,
        )
    )


def check_regions(regions: list[Region], hf: Tensors, expected: Tensors) -> None:
    """Filling parameters through the regions gives ``expected``, each real element written once."""
    filled = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    written = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for region in regions:
        box = tuple(slice(*span) for span in region.box)
        index = tuple(i if isinstance(i, int) else slice(*i) for i in region.index)
        filled[region.param][index] = hf[region.hf][box]
        written[region.param][index] += 1
    for name, tensor in expected.items():
        assert torch.equal(filled[name], tensor), name
        # Values count from 1, so that 0 means vocabulary padding.
        assert torch.equal(written[name], (tensor != 0).float()), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_trainer_regions_are_the_shards(tensor: int, pipeline: int, tied: bool) -> None:
    sizes = Sizes(tied=tied, kv_heads=4 if tensor == 4 else 2)
    table, hf = architecture(sizes), hf_tensors(sizes)
    assert {name: tuple(t.shape) for name, t in hf.items()} == table.hf_shapes()
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        expected = trainer_shard(hf, sizes, tensor, at.tensor, pipeline, at.pipeline)
        check_regions(table.trainer_regions(layout, at), hf, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_engine_regions_are_the_shards(tensor: int, kv_heads: int, tied: bool) -> None:
    """With fewer kv heads than ranks the engine keeps a head on several ranks."""
    sizes = Sizes(tied=tied, kv_heads=kv_heads)
    table, hf = architecture(sizes), hf_tensors(sizes)
    layout = ParallelLayout(tensor=tensor)
    for rank in range(tensor):
        regions = table.engine_regions(layout, RankCoordinates(tensor=rank))
        check_regions(regions, hf, engine_shard(hf, sizes, tensor, rank))


def test_a_rank_of_padding_rows_holds_no_tensor() -> None:
    """100 tokens are stored as 128 rows: the last of 8 ranks has none of them."""
    sizes = Sizes(vocab=100, heads=8, kv_heads=8, head_dim=2)
    regions = architecture(sizes).trainer_regions(ParallelLayout(tensor=8), RankCoordinates(tensor=7))
    assert "embedding.word_embeddings.weight" not in {region.param for region in regions}
    regions = architecture(sizes).trainer_regions(ParallelLayout(tensor=8), RankCoordinates(tensor=6))
    [embedding] = [r for r in regions if r.param == "embedding.word_embeddings.weight"]
    assert (embedding.box[0], embedding.index[0]) == ((96, 100), (0, 4))


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(UserError, match=r"q_proj.*6 units of 6 do not divide by 4 tensor ranks"):
        architecture(Sizes(heads=6)).trainer_regions(ParallelLayout(tensor=4), RankCoordinates())
    with pytest.raises(UserError, match="pipeline_parallel_size: 4 layers do not divide by 3 stages"):
        architecture(Sizes()).trainer_regions(ParallelLayout(pipeline=3), RankCoordinates())
    with pytest.raises(UserError, match="3 tensor ranks do not divide by 2 units"):
        Slot(12, 6).span(0, 3, "k")


def test_names_that_disagree_are_all_listed() -> None:
    """Also when the names come from an iterator, as an export's do."""
    assert name_problems(["a", "b", "c"], iter(["b", "d"]), "here") == [
        "here: missing tensor a",
        "here: missing tensor c",
        "here: no rule maps tensor d",
    ]
