"""Curricula over reasoning-gym tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megarl.config.section import NonNegativeInt, PositiveInt, Section


class CurriculumConfig(Section):
    """Raise a reasoning-gym task's level, from 0, as the policy's accuracy on it rises."""

    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Accuracy on the task at its current level at which the level rises."""
    min_samples: PositiveInt = 64
    """Samples needed at the current level before it may rise; accuracy is over the latest min_samples."""
    max_level: NonNegativeInt | None = None
    """Highest level; null: the task's highest."""
