"""Sets of problems made of other sets: what filters left of one, and several end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megarl.config.data import EvalDataConfig, PromptDataConfig
from megarl.data.load import Converted, collect, locate
from megarl.data.prompts import PromptDataset
from megarl.data.report import LoadReport
from megarl.environments.curriculum import Curricula, Curriculum
from megarl.records import Prompt


class KeptPrompts(PromptDataset):
    """Those of another set's problems that filters and bad rows left."""

    def __init__(self, base: PromptDataset, reading: PromptDataConfig | EvalDataConfig, *args: Any) -> None:
        super().__init__(*args)
        report = LoadReport(self._field)
        self.reports = [report]

        def convert(_where: str, row: dict[str, Any]) -> Converted[int]:
            length = len(base._prompt(row["index"]).token_ids)
            return Converted([row["index"]], length, length)

        rows = ((f"{self._field}: problem {i}", {"index": i}) for i in range(len(base)))
        self._base, self._indices = base, list(collect(rows, convert, reading, report))

    def __len__(self) -> int:
        return len(self._indices)

    def questions(self) -> Iterator[str]:
        """Those of the problems that are left."""
        kept = set(self._indices)
        return (question for i, question in enumerate(self._base.questions()) if i in kept)

    def _prompt(self, index: int) -> Prompt:
        return replace(self._base._prompt(self._indices[index]), index=index)


class MixedPrompts(PromptDataset):
    """Several sets, end to end."""

    is_mixture = True

    def __init__(self, sets: dict[str, PromptDataset], weights: dict[str, float] | None, *args: Any) -> None:
        super().__init__(*args)
        self._names, self._sets = list(sets), list(sets.values())
        self._sizes = [len(each) for each in self._sets]
        self._starts = [sum(self._sizes[:k]) for k in range(len(self._sizes))]
        self.reports = [report for each in self._sets for report in each.reports]
        levels = {
            name: each.curriculum for name, each in sets.items() if isinstance(each.curriculum, Curriculum)
        }
        self.curriculum = Curricula(levels) if levels else None
        if weights is not None:
            self.parts = [(len(each), weights[name]) for name, each in sets.items()]

    def __len__(self) -> int:
        return sum(self._sizes)

    def questions(self) -> Iterator[str]:
        """Those of one set after the other."""
        return itertools.chain.from_iterable(each.questions() for each in self._sets)

    def _prompt(self, index: int) -> Prompt:
        part, row = locate(index, self._sizes)
        prompt = self._sets[part]._prompt(row)
        metadata = {**prompt.metadata, "source": self._names[part]}
        if metadata.get("category") is None:  # an evaluation then tells the sources apart
            metadata["category"] = self._names[part]
        return replace(prompt, index=index, metadata=metadata)
