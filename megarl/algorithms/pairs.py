"""What training on preference pairs has in common, whether a policy learns from them or a reward model."""

from __future__ import annotations

from megarl.algorithms.run import Run
from megarl.config.preference import DpoConfig, RmConfig
from megarl.trainer.batches import PackedStep

HEADLINES = ("loss", "reward_accuracy", "reward_margin")
"""Of the last step, they stand in summary.json."""


def validates(config: DpoConfig | RmConfig, step: int) -> bool:
    """Whether held-out pairs, where there are any, are measured after ``step``."""
    training = config.training
    at_interval = bool(training.validation_interval) and step % training.validation_interval == 0
    return at_interval or step == training.num_steps


def validation_metrics(held: dict[str, float]) -> dict[str, float]:
    """What the loss of held-out pairs told, as it is logged."""
    names = {"loss": "loss", "reward_accuracy": "accuracy", "reward_margin": "margin"}
    return {f"validation_{name}": held[key] for key, name in names.items()}


def train_metrics(run: Run, packed: PackedStep) -> dict[str, float]:
    """Sizes and speed of the step whose ``train`` phase has ended."""
    return packed.placed | {
        "num_tokens": packed.num_tokens,
        "num_microbatches": len(packed.batches),
        "tokens_per_second_train": packed.num_tokens / run.timers.seconds("train"),
    }
