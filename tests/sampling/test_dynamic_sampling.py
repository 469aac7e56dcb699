"""The groups that dynamic sampling keeps, and its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megarl.errors import UserError
from megarl.records import Group, Prompt, Sample
from megarl.sampling.dynamic_sampling import sample_unequal


def group(index: int, rewards: list[float]) -> Group:
    return Group(
        Prompt(index, "", [1]), [Sample(index, [1], [2], [-1.0], 0, "stop", reward=r) for r in rewards]
    )


def drawing(*batches: list[list[float]]) -> Callable[[], list[Group]]:
    def all_batches() -> Iterator[list[Group]]:
        number = 0
        for batch in batches:
            yield [group(number + i, rewards) for i, rewards in enumerate(batch)]
            number += len(batch)

    iterator = all_batches()
    return lambda: next(iterator)


def test_batches_are_drawn_until_there_are_enough() -> None:
    draw = drawing([[0, 0], [0, 1], [1, 1]], [[1, 1], [1, 1], [1, 1]], [[1, 0], [0.5, 0], [0, 1]])
    groups, told = sample_unequal(draw, step=1, num_groups=3, max_batches=3)
    assert [g.prompt.index for g in groups] == [1, 6, 7]
    assert told == {"num_generation_batches": 3, "equal_groups": 5, "surplus_groups": 1}


def test_one_batch_that_is_good_is_taken_as_it_is() -> None:
    groups, told = sample_unequal(drawing([[0, 1], [1, 0]]), step=1, num_groups=2, max_batches=1)
    assert [g.prompt.index for g in groups] == [0, 1]
    assert told == {"num_generation_batches": 1, "equal_groups": 0, "surplus_groups": 0}


def test_the_bound_ends_the_run_and_says_why() -> None:
    draw = drawing([[0, 1], [1, 1]], [[1, 1], [0, 0]], [[0, 1], [0, 1]])
    with pytest.raises(UserError) as error:
        sample_unequal(draw, step=7, num_groups=2, max_batches=2)
    assert str(error.value).startswith(
        "algorithm.max_generation_batches: step 7 has 1 groups with unequal rewards after 2 batches, 3 had "
        "equal ones, 2 are needed"
    )
