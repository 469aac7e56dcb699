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
    """Which benchmark: its columns, its instruction to the model and how answers are judged."""
    directory: PathText | None = None
    """Local copy: a directory as on the hub, or one parquet, JSONL or JSON file; null asks the hub."""
    hub: Text | None = None
    """Hub name in place of the benchmark's usual one (docs/guides/eval.md), e.g. of a later AIME."""
    subset: Text | None = None
    """Configuration of the data set; null is the benchmark's usual one, e.g. gpqa_diamond."""
    split: Text | None = None
    """Split; null is the benchmark's usual one."""

    @property
    def environment(self) -> MathEnvironmentConfig | MultipleChoiceConfig | CodeConfig:
        """The verifier that judges its answers."""
        return _JUDGED_BY[self.name]
