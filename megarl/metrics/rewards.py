"""rewards.jsonl: the rewards of all samples of a step, counted; samples/ has some of the samples only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_VALUES = 32
"""Distinct rewards of a step that are counted one by one; more go into as many bins."""


def count_rewards(rewards: Sequence[float]) -> dict[str, Any]:
    """Return ``{"values", "counts"}`` of a step's rewards, by ascending value.

    Of more than :data:`MOST_VALUES` distinct ones also ``"width"``: values are then the lower edges of bins
    of this width, which the step's smallest and largest reward bound. Rewards that are not finite are counted
    as ``"not_finite"``.
    """
    finite = np.array([reward for reward in rewards if np.isfinite(reward)], dtype=np.float64)
    extra = {"not_finite": len(rewards) - len(finite)} if len(finite) < len(rewards) else {}
    found = Counter(finite.tolist())
    if len(found) <= MOST_VALUES:
        values = sorted(found)
        return {"values": values, "counts": [found[value] for value in values], **extra}
    counts, edges = np.histogram(finite, bins=MOST_VALUES)
    width = float(edges[1] - edges[0])
    return {"values": edges[:-1].tolist(), "counts": counts.tolist(), "width": width, **extra}
