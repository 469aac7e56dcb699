"""Where figures and samples go."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import NonNegativeInt, PositiveInt, Section, Text


class WandbConfig(Section):
    """Weights & Biases sink."""

    project: Text
    """W&B project."""
    entity: str | None = None
    """W&B entity; null is the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline writes files under the run directory for `wandb sync`."""


class LoggingConfig(Section):
    """Sinks beside metrics.jsonl, samples/ and report.html, which are always written."""

    tensorboard: bool = False
    """Write TensorBoard events to <run.dir>/tensorboard."""
    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases."""
    samples_per_step: NonNegativeInt = 16
    """Samples written to samples/step_N.jsonl per step (0: none)."""
    report_interval: PositiveInt = 10
    """Rewrite report.html every so many steps (and at the end)."""
