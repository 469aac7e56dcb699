"""Settings of `megarl eval`."""

from __future__ import annotations

from typing import Any, ClassVar

from megarl.config.data import EvalDataConfig
from megarl.config.evaluation import EvaluationSizeConfig
from megarl.config.model import ModelConfig
from megarl.config.rollout import GenerationConfig, Sampling
from megarl.config.run import RunConfig
from megarl.config.section import Section


class EvalConfig(Section, Sampling):
    """Root of `megarl eval`: accuracy, pass@k and cons@k of a checkpoint."""

    converts_checkpoints: ClassVar[bool] = True
    """Whether model.path may be a checkpoint."""

    run: RunConfig
    model: ModelConfig
    data: EvalDataConfig
    rollout: GenerationConfig
    evaluation: EvaluationSizeConfig = EvaluationSizeConfig()

    def max_sequence_length(self, model_config: dict[str, Any]) -> int:
        """Return the longest prompt + response in tokens: max_position_embeddings."""
        return int(model_config["max_position_embeddings"])

    def describe(self, model_config: dict[str, Any] | None) -> list[str]:
        """Return the lines of --dry-run=full on derived values."""
        lines = []
        if model_config is not None and "max_position_embeddings" in model_config:
            lines.append(f"longest sequence: {self.max_sequence_length(model_config)} tokens")
        return [*lines, *self.rollout.engine.describe()]
