"""Public benchmarks as prompt sources."""

from __future__ import annotations

import string
from typing import Literal

from megarl.config.environments import CodeConfig, MathEnvironmentConfig, MultipleChoiceConfig
from megarl.config.section import PathText, Section, Text

BenchmarkName = Literal["gsm8k", "math500", "aime", "gpqa", "mmlu", "mmlu_pro", "humaneval", "mbpp"]

_MATH = MathEnvironmentConfig()
_CHOICE = MultipleChoiceConfig(
    kind="multiple_choice", choices=string.ascii_uppercase, choices_field="choices"
)
_CODE = CodeConfig(kind="code")
_JUDGED_BY: dict[BenchmarkName, MathEnvironmentConfig | MultipleChoiceConfig | CodeConfig] = {
    "gsm8k": _MATH,
    "math500": _MATH,
    "aime": _MATH,
    "gpqa": _CHOICE,
    "mmlu": _CHOICE,
    "mmlu_pro": _CHOICE,
    "humaneval": _CODE,
    "mbpp": _CODE,
}


class BenchmarkSource(Section):
    """A public benchmark in the layout it has on the Hugging Face hub."""

    source: Literal["benchmark"]
    """Selects this kind of source."""
    name: BenchmarkName
    """The benchmark; it fixes the columns, the instruction to the model and the verifier."""
    directory: PathText | None = None
    """Local copy: a directory laid out as on the hub, or one parquet, JSONL or JSON file; null: the hub."""
    hub: Text | None = None
    """Hub name that replaces the benchmark's default (docs/guides/eval.md), e.g. of a later AIME."""
    subset: Text | None = None
    """Configuration of the dataset; null: the benchmark's default, e.g. gpqa_diamond."""
    split: Text | None = None
    """Split; null: the benchmark's default."""

    @property
    def environment(self) -> MathEnvironmentConfig | MultipleChoiceConfig | CodeConfig:
        """The verifier that scores the answers."""
        return _JUDGED_BY[self.name]
