"""Several reasoning-gym tasks as one: which task a problem is of, its level, and judging it."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.environments.reasoning_gym import ReasoningGymEnvironment
from megarl.environments.tasks import make_dataset
from megarl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megarl.config.mixture import CurriculumConfig, ReasoningGymMixtureSource
    from megarl.records import Group, Prompt


class Mixture:
    """Problems by index, each of one task, at that task's present level.

    Problem i's task depends on seed + i alone, the problem also on the level. ``observe`` raises levels;
    ``state`` and ``load_state`` carry them over an interruption.
    """

    def __init__(self, source: ReasoningGymMixtureSource, field: str) -> None:
        self._source, self._field = source, field
        self._weights = [task.weight for task in source.tasks]
        names = [task.task for task in source.tasks]
        self.levels = [0] * len(names)
        self._datasets: dict[tuple[int, int], Any] = {}
        self._recent: list[deque[bool]] = [deque(maxlen=self._window) for _ in names]
        for number in range(len(names)):
            self._dataset(number, 0)

    def entry(self, index: int) -> tuple[dict[str, Any], int, int]:
        """The reasoning-gym entry of problem ``index``, its task's number and its level."""
        rng = random.Random(f"mixture {self._source.seed + index}")
        [number] = rng.choices(range(len(self._weights)), self._weights)
        level = self.levels[number]
        return self._dataset(number, level)[index], number, level

    def observe(self, groups: Iterable[Group]) -> list[str]:
        """Count what was right, and raise levels; returns a line per level that rose."""
        curriculum = self._source.curriculum
        if curriculum is None:
            return []
        for group in groups:
            number, level = group.prompt.metadata["task"], group.prompt.metadata["level"]
            if level == self.levels[number]:  # problems drawn before a rise say nothing of the new level
                self._recent[number].extend((sample.reward or 0.0) >= 1.0 for sample in group.samples)
        lines = []
        for number, recent in enumerate(self._recent):
            if len(recent) < curriculum.min_samples:
                continue
            accuracy = sum(recent) / len(recent)
            if accuracy >= curriculum.raise_at and self.levels[number] < self._highest(number, curriculum):
                self.levels[number] += 1
                recent.clear()
                name = self._source.tasks[number].task
                lines.append(f"{name}: level {self.levels[number]} (accuracy {accuracy:.1%} below it)")
        return lines

    def metrics(self) -> dict[str, float]:
        """Levels by task, for metrics.jsonl; nothing without a curriculum."""
        if self._source.curriculum is None:
            return {}
        return {f"level_{i}_{t.task}": self.levels[i] for i, t in enumerate(self._source.tasks)}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"levels": list(self.levels), "recent": [list(recent) for recent in self._recent]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.levels = list(state["levels"])
        self._recent = [deque(recent, maxlen=self._window) for recent in state["recent"]]

    @property
    def _window(self) -> int:
        return self._source.curriculum.min_samples if self._source.curriculum is not None else 1

    def _highest(self, number: int, curriculum: CurriculumConfig) -> int:
        attributes = self._curriculum(number).attributes.values()
        top = max((len(attribute.levels) - 1 for attribute in attributes), default=0)
        return top if curriculum.max_level is None else min(top, curriculum.max_level)

    def _curriculum(self, number: int) -> Any:
        from reasoning_gym.factory import CURRICULA

        task = self._source.tasks[number].task
        if task not in CURRICULA:
            raise UserError(f"{self._field}.curriculum: reasoning-gym has no curriculum for {task!r}")
        return CURRICULA[task]()

    def _dataset(self, number: int, level: int) -> Any:
        if (number, level) not in self._datasets:
            source = task_source(self._source, number)
            made_dataset = make_dataset(source, f"{self._field}.tasks.{number}")
            if self._source.curriculum is not None:
                curriculum = self._curriculum(number)
                curriculum.set_global_level(level)
                made = dataclasses.asdict(curriculum.generate_configuration(source.arguments))
                set_by_level = {name for a in curriculum.attributes.values() for name in _fields_of(a)}
                if clash := sorted(set_by_level & source.arguments.keys()):
                    raise UserError(
                        f"{self._field}.tasks.{number}.arguments.{clash[0]}: set by the curriculum's levels"
                    )
                arguments = source.arguments | {name: made[name] for name in set_by_level}
                source = source.model_copy(update={"arguments": arguments})
                made_dataset = make_dataset(source, f"{self._field}.tasks.{number}")
            self._datasets[number, level] = made_dataset
        return self._datasets[number, level]


class CurriculumEnvironment(Verifier):
    """Judges each problem by its own task (``metadata["task"]``); ``info`` adds the task's name."""

    def __init__(self, source: ReasoningGymMixtureSource, field: str) -> None:
        self._judges = [
            ReasoningGymEnvironment(task_source(source, number), f"{field}.tasks.{number}")
            for number in range(len(source.tasks))
        ]
        self._names = [task.task for task in source.tasks]

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """The task's own score in [0, 1]."""
        number = prompt.metadata["task"]
        reward, info = await self._judges[number].judge(prompt, response_text)
        return reward, info | {"task": self._names[number]}


def task_source(source: ReasoningGymMixtureSource, number: int) -> Any:
    """One task of a mixture as a source of its own."""
    from megarl.config.schema import ReasoningGymSource

    task = source.tasks[number]
    return ReasoningGymSource(
        source="reasoning_gym",
        task=task.task,
        arguments=task.arguments,
        size=source.size,
        seed=source.seed,
        extract=task.extract,
        partial_credit=task.partial_credit,
    )


def _fields_of(attribute: Any) -> list[str]:
    names = [
        getattr(attribute, name, None) for name in ("field_name", "lower_field_name", "upper_field_name")
    ]
    return [name for name in names if name]
