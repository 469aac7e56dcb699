"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): replace groups whose rewards are all equal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megarl.advantages.group import is_degenerate
from megarl.errors import UserError
from megarl.records import Group


def sample_unequal(
    draw: Callable[[], list[Group]], *, step: int, num_groups: int, max_batches: int
) -> tuple[list[Group], dict[str, float]]:
    """Return the first ``num_groups`` groups with unequal rewards, in prompt order, and metrics.

    ``draw`` samples and grades a batch of fresh prompts. The metrics are num_generation_batches, equal_groups
    (dropped because all their rewards are equal) and surplus_groups (dropped beyond ``num_groups``).

    Raises:
        UserError: ``max_batches`` batches did not contain enough groups.
    """
    kept: list[Group] = []
    equal = batches = 0
    while len(kept) < num_groups:
        if batches == max_batches:
            raise UserError(
                f"algorithm.max_generation_batches: step {step} has {len(kept)} groups with unequal rewards "
                f"after {batches} batches, {equal} had equal ones, {num_groups} are needed: the problems are "
                "too easy or too hard for the model"
            )
        drawn = draw()
        batches += 1
        unequal = [g for g in drawn if not is_degenerate(np.array([s.reward or 0.0 for s in g.samples]))]
        equal += len(drawn) - len(unequal)
        kept += unequal
    values: dict[str, float] = {
        "num_generation_batches": batches,
        "equal_groups": equal,
        "surplus_groups": len(kept) - num_groups,
    }
    return kept[:num_groups], values
