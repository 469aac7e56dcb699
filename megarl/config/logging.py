"""Settings of logging."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import NonNegativeInt, PositiveInt, Section, Text


class WandbConfig(Section):
    """Weights & Biases."""

    project: Text
    """W&B project."""
    entity: str | None = None
    """W&B entity; null: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline: write files under the run directory, for `wandb sync`."""


class LoggingConfig(Section):
    """Sinks in addition to metrics.jsonl, samples/ and report.html."""

    tensorboard: bool = False
    """Write TensorBoard events to <run.dir>/tensorboard."""
    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases."""
    interval: PositiveInt | None = None
    """Steps per line on the console; null: about 1% of the steps, more if they take long."""
    samples_per_step: NonNegativeInt = 16
    """Samples written to samples/step_N.jsonl per step (0: none)."""
    report_interval: PositiveInt = 10
    """Steps between updates of report.html; it is also written at the end."""
