"""Problems that environments make: games and a user's own, and reasoning-gym tasks with levels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megarl.config.environments import EnvironmentSource
from megarl.config.mixture import ReasoningGymMixtureSource
from megarl.data.prompts import NUM_CHECKED_AT_LOAD, PromptDataset
from megarl.environments import make_environment
from megarl.environments.curriculum import Mixture
from megarl.errors import UserError
from megarl.records import Prompt


class _Made(PromptDataset):
    _source: EnvironmentSource | ReasoningGymMixtureSource

    def check(self) -> None:
        """Make the first of them."""
        for index in range(min(len(self), NUM_CHECKED_AT_LOAD)):
            self._prompt(index)

    def __len__(self) -> int:
        return self._source.size

    def questions(self) -> Iterator[str]:
        return questions_of(self._source, self._field)


class EnvironmentPrompts(_Made):
    """Problems that the environment makes, told apart by their seeds alone."""

    _source: EnvironmentSource

    def __init__(self, source: EnvironmentSource, *args: Any) -> None:
        super().__init__(*args)
        self._source = source
        self._maker: Any = make_environment(source.environment, f"{self._field}.environment")
        if not callable(getattr(self._maker, "problem", None)):
            raise UserError(
                f"{self._field}.environment: {type(self._maker).__name__} has no method problem(seed):"
                " it makes no problems of its own"
            )

    def _prompt(self, index: int) -> Prompt:
        made = self._maker.problem(self._source.seed + index)
        metadata = {"question": made.text, "answer": made.answer, **made.metadata}
        return self._make(index, f"{self._field}: problem {index}", made.text, metadata)


class CurriculumPrompts(_Made):
    """Problems of several reasoning-gym tasks, at their present levels."""

    _source: ReasoningGymMixtureSource

    def __init__(self, source: ReasoningGymMixtureSource, *args: Any) -> None:
        super().__init__(*args)
        self._source = source
        self._mixture = self.curriculum = Mixture(source, self._field)

    def _prompt(self, index: int) -> Prompt:
        entry, task, level = self._mixture.entry(index)
        metadata = {"question": entry["question"], "answer": entry["answer"], "entry": entry}
        metadata |= {"task": task, "level": level, "category": self._source.tasks[task].task}
        return self._make(index, f"{self._field}: problem {index}", entry["question"], metadata)


def questions_of(source: EnvironmentSource | ReasoningGymMixtureSource, field: str) -> Iterator[str]:
    """The bare problem texts, at the lowest levels; of a game its seed, for games may begin alike."""
    if isinstance(source, EnvironmentSource):
        yield from (f"problem of seed {source.seed + index}" for index in range(source.size))
    else:
        mixture = Mixture(source, field)
        yield from (str(mixture.entry(index)[0]["question"]) for index in range(source.size))
