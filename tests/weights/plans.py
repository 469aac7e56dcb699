"""One engine rank's plan in one call, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.models.table import Region
from megarl.weights.plan import Owner, Planner, Reader
from megarl.weights.sync_plan import ParamInfo, WeightPlan


def plan_weights(
    owners: Sequence[Owner],
    regions: list[Region],
    params: Mapping[str, ParamInfo],
    *,
    peers_only: bool = False,
    **where: Any,
) -> WeightPlan:
    """The plan for a rank with these regions and parameters; ``where``: host, device, prefer_rank."""
    return Planner(owners, peers_only=peers_only).plan(Reader(regions, params, **where))
