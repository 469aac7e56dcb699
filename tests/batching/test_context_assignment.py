"""Sequences split over context-parallel ranks: each exactly once, budgets, order and balance."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megarl.batching.context_assignment import ContextAssignment, MicrobatchLimits, assign_contexts
from megarl.batching.microbatch_plan import CostModel
from megarl.batching.pack import pack
from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.records import TokenSequence, TrainBatch


def make(lengths: list[int]) -> TrainBatch:
    return TrainBatch.of(TokenSequence(7 * i + np.arange(n), np.arange(n) > 0) for i, n in enumerate(lengths))


def context_ranks(size: int, context: int) -> ParallelLayout:
    return ParallelLayout.from_world_size(
        size, tensor=1, pipeline=1, context=context, sequence_parallel=False
    )


def planned(batch: TrainBatch, limits: MicrobatchLimits, layout: ParallelLayout) -> list[ContextAssignment]:
    return assign_contexts(batch, np.arange(len(batch)), limits, CostModel(), layout)


def microbatches(part: ContextAssignment, layout: ParallelLayout, rank: int) -> list[list[int]]:
    at = layout.coordinates(rank)
    return part.microbatches(layout, at.data, at.context)


def test_invariants_hold_on_random_batches() -> None:
    draw = random.Random(2)
    for _ in range(150):
        context, tensor, pipeline = draw.choice([2, 4]), draw.choice([1, 2]), draw.choice([1, 2])
        virtual = draw.choice([1, 2]) if pipeline > 1 else 1
        layout = ParallelLayout.from_world_size(
            context * tensor * pipeline * draw.choice([1, 2]),
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            sequence_parallel=tensor > 1,
            virtual=virtual,
        )
        budget, size = 256, draw.choice([1, 2])
        split_from = draw.randint(2, budget // context)
        lengths = [draw.randint(1, 100) for _ in range(size * draw.choice([0, 1, 3, 20]))]
        limits = MicrobatchLimits(budget, group_size=size, split_from=split_from)
        parts = planned(make(lengths), limits, layout)
        ranks = range(layout.world_size)
        assert all(len({len(microbatches(part, layout, rank)) for rank in ranks}) == 1 for part in parts)
        found: dict[int, bool] = {}
        for rank in ranks:
            at = layout.coordinates(rank)
            if at.tensor or at.pipeline:
                continue
            for part in parts:
                own = microbatches(part, layout, rank)
                assert len(own) % (pipeline if virtual > 1 else 1) == 0
                multiple = tensor * (2 * context if part.split else 1)
                limit = budget if part.split else budget // context
                assert part.pad_to_multiple == multiple
                for indices in own:
                    steps = part.segments.rows[indices].tolist()
                    assert sum(-(-lengths[i] // multiple) * multiple for i in steps) <= limit
                    if part.split and at.context:
                        continue  # a copy of the first context rank's
                    for i in steps:
                        assert i not in found, "every sequence once"
                        found[i] = part.split
        assert sorted(found) == list(range(len(lengths)))
        for start in range(0, len(lengths), size):
            group = lengths[start : start + size]
            whole = sum(-(-n // tensor) * tensor for n in group) <= budget // context
            assert found[start] == (max(group) >= split_from or not whole)
            assert found[start] == found[start + size - 1], "pairs stay together"


def test_without_the_option_all_are_split() -> None:
    layout = context_ranks(2, 2)
    [part] = planned(make([3, 50, 9]), MicrobatchLimits(64), layout)
    assert part.split and part.pad_to_multiple == 4
    assert sorted(i for m in microbatches(part, layout, 1) for i in m) == [0, 1, 2]


def test_ranks_get_equal_work() -> None:
    draw = random.Random(5)
    layout = context_ranks(8, 4)
    [whole] = planned(
        make([draw.randint(10, 60) for _ in range(200)]), MicrobatchLimits(512, split_from=64), layout
    )
    assert not whole.split and len(whole.plan.rank_costs) == 8
    assert whole.plan.cost_imbalance < 1.01
    own = [[i for each in microbatches(whole, layout, rank) for i in each] for rank in range(8)]
    assert sorted(i for rank in own for i in rank) == list(range(200)), "no two ranks compute the same"


def test_a_rank_without_a_sequence_has_a_dummy_of_its_own_kind() -> None:
    layout = context_ranks(4, 4)
    sequences = make([9, 60])
    packs = [
        [
            pack(sequences, i, segments=part.segments, pad_to_multiple=part.pad_to_multiple)
            for i in microbatches(part, layout, rank)
        ]
        for rank in range(4)
        for part in planned(sequences, MicrobatchLimits(240, split_from=20), layout)
        if not part.split
    ]
    lengths = sorted(batch.lengths.tolist() for [batch] in packs if batch.lengths is not None)
    assert lengths == [[0], [0], [0], [9]]
    assert all(batch.token_ids.shape == (max(1, batch.lengths[0]),) for [batch] in packs)  # type: ignore[index]


def test_prompts_are_shared_within_a_kind() -> None:
    prompt = list(range(30))
    group = TrainBatch.of(
        TokenSequence(prompt + [50 + i] * n, [0] * 30 + [1] * n, num_prompt_tokens=30)
        for i, n in enumerate((2, 70, 4, 80))
    )
    layout = context_ranks(2, 2)
    split, whole = planned(group, MicrobatchLimits(400, share_prefixes=True, split_from=50), layout)
    assert split.split and not whole.split
    for part, own in ((split, {1, 3}), (whole, {0, 2})):
        assert set(part.segments.rows.tolist()) == own
        assert part.segments.prefixes.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("split_from", [None, 2])
def test_too_long_is_refused(split_from: int | None) -> None:
    layout = context_ranks(2, 2)
    with pytest.raises(UserError, match=r"max_tokens_per_microbatch = 64"):
        planned(make([9, 65]), MicrobatchLimits(64, split_from=split_from), layout)
