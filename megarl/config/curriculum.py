"""Curricula over reasoning-gym tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megarl.config.section import NonNegativeInt, PositiveInt, Section


class CurriculumConfig(Section):
    """Levels that rise with measured accuracy: reasoning-gym's own for the task, from 0 on."""

    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The level rises when this share of the task's samples at that level was right."""
    min_samples: PositiveInt = 64
    """Samples of the task at its level before it may rise; the share is over the latest so many."""
    max_level: NonNegativeInt | None = None
    """Highest level; null: as high as the task goes."""
