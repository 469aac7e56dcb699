"""Mixtures of reasoning-gym tasks, and curricula over them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megarl.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Text


class MixtureTask(Section):
    """One task of a mixture."""

    task: Text
    """Dataset name in reasoning-gym, e.g. chain_sum."""
    weight: PositiveFloat = 1.0
    """Its share of the problems, relative to the others'."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that dataset; with a curriculum, those that its levels do not set."""
    extract: Literal["response", "last_number"] = "response"
    """What is scored: the response (its <answer> part where it has one), or the last number in that."""
    partial_credit: bool = True
    """Keep the task's scores below 1; false makes them 0."""


class CurriculumConfig(Section):
    """Levels that rise with measured accuracy: reasoning-gym's own, from 0 on, one per task."""

    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8
    """A task's level rises when this share of its samples at that level was right."""
    min_samples: PositiveInt = 64
    """Samples of a task at its level before it may rise; the share is over the latest so many."""
    max_level: NonNegativeInt | None = None
    """Highest level; null: as high as the task goes."""


class ReasoningGymMixtureSource(Section):
    """Problems of several reasoning-gym tasks, drawn by weight, their difficulty rising where asked for."""

    source: Literal["reasoning_gym_mixture"]
    """Selects this kind of source."""
    tasks: Annotated[list[MixtureTask], Field(min_length=1)]
    """A list of {task, weight 1.0, arguments {}, extract response or last_number, partial_credit true}."""
    curriculum: CurriculumConfig | None = None
    """Raise the tasks' levels with the accuracy (grpo; levels are saved with the run); null: none."""
    size: PositiveInt = 10_000
    """Number of problems."""
    seed: NonNegativeInt = 1
    """Problem i is made from seed + i; train and held-out ranges [seed, seed + size) must not overlap."""
