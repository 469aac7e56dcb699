"""Problems that environments make: games and a user's own."""

from __future__ import annotations

from typing import Any

from megarl.config.environments import EnvironmentSource
from megarl.data.prompts import SeededPrompts
from megarl.environments import make_environment
from megarl.errors import UserError
from megarl.records import Prompt


class EnvironmentPrompts(SeededPrompts):
    """Problems that the environment makes, told apart by their seeds alone."""

    _source: EnvironmentSource

    def __init__(self, source: EnvironmentSource, *args: Any) -> None:
        super().__init__(source, *args)
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
