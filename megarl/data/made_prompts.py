"""Problems that environments make: games and a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megarl.config.environments import EnvironmentSource
from megarl.data.prompts import NUM_CHECKED_AT_LOAD, PromptDataset, questions_of
from megarl.environments import make_environment
from megarl.errors import UserError
from megarl.records import Prompt


class EnvironmentPrompts(PromptDataset):
    """Problems that the environment makes, told apart by their seeds alone."""

    def __init__(self, source: EnvironmentSource, *args: Any) -> None:
        super().__init__(*args)
        self._source = source
        self._maker: Any = make_environment(source.environment, f"{self._field}.environment")
        if not callable(getattr(self._maker, "problem", None)):
            raise UserError(
                f"{self._field}.environment: {type(self._maker).__name__} has no method problem(seed):"
                " it makes no problems of its own"
            )

    def check(self) -> None:
        """Make the first of them."""
        for index in range(min(len(self), NUM_CHECKED_AT_LOAD)):
            self._prompt(index)

    def __len__(self) -> int:
        return self._source.size

    def questions(self) -> Iterator[str]:
        """Stand-ins for their texts: games may begin alike."""
        return questions_of(self._source, self._field)

    def _prompt(self, index: int) -> Prompt:
        made = self._maker.problem(self._source.seed + index)
        metadata = {"question": made.text, "answer": made.answer, **made.metadata}
        return self._make(index, f"{self._field}: problem {index}", made.text, metadata)
