"""Advantages of the user's own (algorithm.advantage), one function call per group, on rank 0.

The function gets the group (its prompt and its samples, graded) and their rewards [G] float64, with the
penalties that the configuration takes off; it returns [G] advantages. Tokens of a sample share its advantage.
Whole-batch standardisation, KL in the reward and the clip come after it as configured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megarl.config.dotted import load_function
from megarl.errors import UserError
from megarl.records import Group

Array = npt.NDArray[np.float64]
GroupAdvantage = Callable[[Group, Array], Array]


def load_advantage(path: str | None) -> GroupAdvantage | None:
    """The function that algorithm.advantage names, if it names one; UserError where it cannot be loaded."""
    return None if path is None else load_function(path, "algorithm.advantage")


def custom_advantages(function: GroupAdvantage, name: str, groups: Sequence[Group], rewards: Array) -> Array:
    """Advantages [N] of all samples of the groups, in their order, for rewards [N].

    Raises:
        UserError: the function returned something else than G finite numbers; ``name`` is what the
            configuration calls it.
    """
    found, start = [np.zeros(0)], 0
    for number, group in enumerate(groups):
        end = start + len(group.samples)
        values = np.asarray(function(group, rewards[start:end].copy()), dtype=np.float64)
        if values.shape != (end - start,):
            raise UserError(
                f"algorithm.advantage: {name} must return one number per sample, [{end - start}] for group "
                f"{number}; it returned shape {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise UserError(f"algorithm.advantage: {name} returned {values.tolist()} for group {number}")
        found.append(values)
        start = end
    return np.concatenate(found)
