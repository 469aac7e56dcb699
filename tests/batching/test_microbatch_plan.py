"""The planner: invariants on random batches, balance, and packings with known answers."""

from __future__ import annotations

import random

import pytest

from megarl.batching.microbatch_plan import CostModel, PackingPlan, plan_microbatches
from megarl.errors import UserError


def lognormal_lengths(rng: random.Random, n: int, longest: int) -> list[int]:
    """Typical rollout lengths: many short ones and a heavy tail cut at the longest."""
    return [min(longest, max(1, int(rng.lognormvariate(6.0, 0.9)))) for _ in range(n)]


def flat(plan: PackingPlan) -> list[list[int]]:
    return [microbatch for rank in plan.microbatches for microbatch in rank]


def test_invariants_hold_on_random_batches() -> None:
    rng = random.Random(0)
    for _ in range(300):
        budget = rng.choice([1, 7, 64, 1000, 4096])
        multiple = rng.choice([m for m in (1, 2, 4, 8) if m <= budget])
        longest = budget // multiple * multiple
        shape = rng.choice(["uniform", "same", "lognormal", "full"])
        n = rng.choice([0, 1, 2, 3, 9, 50, 200])
        lengths = {
            "uniform": [rng.randint(1, longest) for _ in range(n)],
            "same": [rng.randint(1, longest)] * n,
            "lognormal": lognormal_lengths(rng, n, longest),
            "full": [longest] * n,
        }[shape]
        ranks, equal = rng.choice([1, 2, 3, 8]), rng.random() < 0.7
        group = rng.choice([1, 2, 4]) if equal else 1
        plan = plan_microbatches(
            lengths,
            max_tokens=budget,
            num_ranks=ranks,
            pad_to_multiple=multiple,
            equal_counts=equal,
            microbatch_group_size=group,
        )
        padded = [-(-length // multiple) * multiple for length in lengths]
        assert sorted(i for m in flat(plan) for i in m) == list(range(n))
        assert all(sum(padded[i] for i in m) <= budget for m in flat(plan))
        assert len(plan.microbatches) == ranks
        assert plan.num_tokens == sum(padded)
        if equal:
            assert len({len(rank) for rank in plan.microbatches}) == 1
            assert plan.num_microbatches % group == 0
        empty = sum(not m for m in flat(plan))
        assert empty == max(0, len(flat(plan)) - n), "empty microbatches only where sequences run out"
        if n >= ranks:
            assert all(any(rank) for rank in plan.microbatches)


def test_known_packings() -> None:
    plan = plan_microbatches([6, 4, 5, 5, 3, 7], max_tokens=10)
    assert sorted(map(sorted, plan.microbatches[0])) == [[0, 1], [2, 3], [4, 5]]
    assert plan_microbatches([3, 3, 3], max_tokens=9).microbatches == [[[0, 1, 2]]]
    assert plan_microbatches([], max_tokens=9, num_ranks=2).microbatches == [[], []]
    # Three sequences for four ranks: one rank idles, with an empty microbatch to keep step.
    plan = plan_microbatches([2, 2, 2], max_tokens=9, num_ranks=4)
    assert sorted(map(len, flat(plan))) == [0, 1, 1, 1]
    # Nine sequences that fill a microbatch each: two rounds on eight ranks, seven empty.
    plan = plan_microbatches([8] * 9, max_tokens=8, num_ranks=8)
    assert plan.num_microbatches == 2 and sum(not m for m in flat(plan)) == 7
    # Padding counts: 3 sequences of 5 are 3 of 8, and only 2 fit.
    assert plan_microbatches([5, 5, 5], max_tokens=16, pad_to_multiple=8).num_microbatches == 2


def test_quadratic_cost_is_what_is_balanced() -> None:
    """One sequence of 100 costs as much as 25 of 20 when b dominates, as 5 of 20 when a does."""
    lengths = [100] + [20] * 25
    quadratic = plan_microbatches(lengths, max_tokens=600, num_ranks=2, costs=CostModel(0.0, 1.0))
    alone = next(rank for rank in quadratic.microbatches if 0 in rank[0])
    assert alone == [[0]] and quadratic.cost_imbalance == 1.0
    linear = plan_microbatches(lengths, max_tokens=600, num_ranks=2, costs=CostModel(1.0, 0.0))
    assert linear.rank_costs == [300.0, 300.0]


@pytest.mark.parametrize(("num_sequences", "imbalance"), [(64, 1.02), (256, 1.005), (1024, 1.002)])
def test_ranks_are_balanced_on_steps_of_usual_size(num_sequences: int, imbalance: float) -> None:
    rng = random.Random(num_sequences)
    costs = CostModel.transformer(hidden_size=576)
    for _ in range(5):
        lengths = lognormal_lengths(rng, num_sequences, 2048)
        plan = plan_microbatches(lengths, max_tokens=4096, num_ranks=8, costs=costs)
        bound = -(-sum(lengths) // (4096 * 8))
        assert plan.cost_imbalance <= imbalance
        assert plan.num_microbatches <= max(bound + 1, bound * 1.01)


def test_microbatches_of_one_round_cost_about_the_same() -> None:
    """Expert parallelism waits for this: in every round, the costliest rank against the mean."""
    rng = random.Random(7)
    lengths = lognormal_lengths(rng, 2000, 4096)
    costs = CostModel.transformer(hidden_size=576)
    plan = plan_microbatches(lengths, max_tokens=8192, num_ranks=8, costs=costs)
    waited = useful = 0.0
    for round_index in range(plan.num_microbatches):
        row = [
            sum(costs.a * lengths[i] + costs.b * lengths[i] ** 2 for i in r[round_index])
            for r in plan.microbatches
        ]
        waited += max(row)
        useful += sum(row) / 8
    assert waited / useful < 1.05


def test_plans_are_deterministic_and_indices_sorted() -> None:
    rng = random.Random(3)
    lengths = lognormal_lengths(rng, 500, 1024)
    plans = [plan_microbatches(lengths, max_tokens=2048, num_ranks=4) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert all(m == sorted(m) for m in flat(plans[0]))


def test_impossible_sequences_are_named() -> None:
    with pytest.raises(UserError, match=r"sequence 1 has 11 tokens.*packing.max_tokens_per_microbatch = 10"):
        plan_microbatches([10, 11], max_tokens=10)
    with pytest.raises(UserError, match=r"sequence 0 has 9 tokens \(12 padded to a multiple of 4\)"):
        plan_microbatches([9], max_tokens=10, pad_to_multiple=4)
    with pytest.raises(UserError, match="sequence 2 has 0 tokens"):
        plan_microbatches([1, 1, 0], max_tokens=10)
