"""Pairs in the planner: never split, never over the budget, padding counted per sequence."""

from __future__ import annotations

import random

import pytest

from megarl.batching.microbatch_plan import CostModel, plan_groups, plan_microbatches
from megarl.errors import UserError


def test_pairs_stay_together_on_random_batches() -> None:
    rng = random.Random(0)
    for _ in range(200):
        multiple, ranks = rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
        lengths = [rng.randint(1, 60) for _ in range(2 * rng.choice([1, 2, 9, 50]))]
        budget = rng.choice([128, 300, 4096])
        plan = plan_groups(
            lengths, group_size=2, max_tokens=budget, num_ranks=ranks, pad_to_multiple=multiple
        )
        padded = [-(-length // multiple) * multiple for length in lengths]
        batches = [batch for rank in plan.microbatches for batch in rank]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert len({len(rank) for rank in plan.microbatches}) == 1
        assert plan.num_tokens == sum(padded)
        for batch in batches:
            assert sum(padded[i] for i in batch) <= budget
            assert all(i % 2 == 0 for i in batch[0::2])
            assert [i + 1 for i in batch[0::2]] == batch[1::2]


def test_equal_halves_cost_what_two_sequences_cost() -> None:
    costs = CostModel(1.0, 0.01)
    pairs = plan_groups([30, 30, 50, 50], group_size=2, max_tokens=100, costs=costs)
    alone = plan_microbatches([30, 30, 50, 50], max_tokens=100, costs=costs)
    assert pairs.rank_costs == pytest.approx(alone.rank_costs)


def test_groups_of_one_are_the_plain_plan() -> None:
    lengths = [5, 9, 2, 7]
    assert plan_groups(lengths, group_size=1, max_tokens=12) == plan_microbatches(lengths, max_tokens=12)


def test_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match=r"sequences 2 to 3 have 8 \+ 4 tokens.*per_microbatch = 10"):
        plan_groups([4, 4, 7, 3], group_size=2, max_tokens=10, pad_to_multiple=4)
    with pytest.raises(UserError, match="sequence 3 has no tokens"):
        plan_groups([4, 4, 7, 0], group_size=2, max_tokens=10)
