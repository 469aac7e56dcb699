"""Curricula over reasoning-gym tasks: the level rises with accuracy."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any

from megarl.environments.tasks import make_dataset
from megarl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reasoning_gym.dataset import ProceduralDataset

    from megarl.config.curriculum import CurriculumConfig
    from megarl.config.data import PromptReasoningGymSource
    from megarl.records import Group


class Curriculum:
    """Problems of one task by index, at the current level; a problem depends on its seed and the level.

    ``observe`` raises the level; ``state`` and ``load_state`` are for checkpoints.
    """

    def __init__(self, source: PromptReasoningGymSource, settings: CurriculumConfig, field: str) -> None:
        self._source, self._settings, self._field = source, settings, field
        self.level = 0
        self._datasets: dict[int, ProceduralDataset] = {}
        self._recent: deque[bool] = deque(maxlen=settings.min_samples)
        self._levels = self._make_levels()
        self.dataset(0)

    def entry(self, index: int) -> dict[str, Any]:
        """Return the reasoning-gym entry of problem ``index`` at the current level."""
        return self.dataset(self.level)[index]

    def observe(self, groups: Iterable[Group]) -> list[str]:
        """Update the accuracy and raise the level if it is reached; return a log line if so."""
        for group in groups:
            if group.prompt.metadata["level"] == self.level:  # ignore samples of an earlier level
                self._recent.extend((sample.reward or 0.0) >= 1.0 for sample in group.samples)
        if len(self._recent) < self._settings.min_samples or self.level >= self._highest:
            return []
        accuracy = sum(self._recent) / len(self._recent)
        if accuracy < self._settings.raise_at:
            return []
        self.level += 1
        self._recent.clear()
        return [f"{self._source.task}: level {self.level} (accuracy {accuracy:.1%} below it)"]

    def metrics(self) -> dict[str, float]:
        """Return the level as a metric."""
        return {"level": self.level}

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"level": self.level, "recent": list(self._recent)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`state`."""
        self.level = state["level"]
        self._recent = deque(state["recent"], maxlen=self._settings.min_samples)

    def dataset(self, level: int) -> ProceduralDataset:
        """Return the task's dataset at ``level``."""
        if level not in self._datasets:
            source = self._source
            self._levels.set_global_level(level)
            made = dataclasses.asdict(self._levels.generate_configuration(source.arguments))
            arguments = source.arguments | {name: made[name] for name in self._set_by_level}
            at_level = source.model_copy(update={"arguments": arguments})
            self._datasets[level] = make_dataset(at_level, self._field)
        return self._datasets[level]

    def _make_levels(self) -> Any:
        from reasoning_gym.factory import CURRICULA

        source = self._source
        make_dataset(source, self._field)  # names a wrong task or argument
        if source.task not in CURRICULA:
            raise UserError(f"{self._field}.curriculum: reasoning-gym has no curriculum for {source.task!r}")
        levels = CURRICULA[source.task]()
        attributes = levels.attributes.values()
        self._set_by_level = {name for attribute in attributes for name in _fields_of(attribute)}
        if clash := sorted(self._set_by_level & source.arguments.keys()):
            raise UserError(f"{self._field}.arguments.{clash[0]}: set by the curriculum's levels")
        return levels

    @property
    def _highest(self) -> int:
        top = max((len(attribute.levels) - 1 for attribute in self._levels.attributes.values()), default=0)
        wanted = self._settings.max_level
        return top if wanted is None else min(top, wanted)


class Curricula:
    """The curricula of a mixture, by source name; each has its own level."""

    def __init__(self, curricula: Mapping[str, Curriculum]) -> None:
        self._curricula = curricula

    def observe(self, groups: Iterable[Group]) -> list[str]:
        """Update each curriculum with the groups of its source; return log lines."""
        groups = list(groups)
        return [
            f"{name}: {line}"
            for name, each in self._curricula.items()
            for line in each.observe([group for group in groups if group.prompt.metadata["source"] == name])
        ]

    def metrics(self) -> dict[str, float]:
        """Return the levels by source as metrics."""
        return {f"level_{name}": each.level for name, each in self._curricula.items()}

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {name: each.state() for name, each in self._curricula.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`state`."""
        for name, each in self._curricula.items():
            each.load_state(state[name])


def first_dataset(source: Any, field: str) -> ProceduralDataset:
    """Return the initial dataset of a reasoning-gym source: with a curriculum at the lowest level."""
    settings = getattr(source, "curriculum", None)
    return make_dataset(source, field) if settings is None else Curriculum(source, settings, field).dataset(0)


def _fields_of(attribute: Any) -> list[str]:
    names = [
        getattr(attribute, name, None) for name in ("field_name", "lower_field_name", "upper_field_name")
    ]
    return [name for name in names if name]
