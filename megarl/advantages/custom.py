"""User-defined advantages (algorithm.advantage): one function call per group, on rank 0.

The function takes a graded group (its prompt and samples) and its rewards [G] float64, configured penalties
subtracted, and returns advantages [G]. All tokens of a sample share its advantage. Whole-batch
standardisation, KL in the reward and clipping follow as configured.
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
    """Load the function that algorithm.advantage names, if any; UserError if it cannot be loaded."""
    return None if path is None else load_function(path, "algorithm.advantage")


def custom_advantages(function: GroupAdvantage, name: str, groups: Sequence[Group], rewards: Array) -> Array:
    """Return the advantages [N] of all samples, in the groups' order, for rewards [N].

    Raises:
        UserError: the function returned anything but G finite numbers; ``name`` is its name in the
            configuration, for the message.
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
