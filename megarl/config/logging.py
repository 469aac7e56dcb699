"""Settings of logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megarl.config.dotted import is_dotted
from megarl.config.section import NonNegativeInt, PositiveInt, Problems, Section, Text, rule


def _switch(value: Any) -> Any:
    """Read true as a section of defaults, false as none."""
    return {} if value is True else None if value is False else value


_SWITCH = BeforeValidator(_switch)


class WandbConfig(Section):
    """Weights & Biases."""

    project: Text | None = None
    """W&B project; null: WANDB_PROJECT, else megarl."""
    entity: str | None = None
    """W&B entity; null: the account's default."""
    name: Text | None = None
    """Name of the run; null: that of run.dir."""
    group: Text | None = None
    """Group of the run, e.g. the seeds of one experiment."""
    tags: list[Text] = Field(default_factory=list)
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline: write files under the run directory, for `wandb sync`."""


class MlflowConfig(Section):
    """MLflow."""

    tracking_uri: Text | None = None
    """Server or database; null: MLFLOW_TRACKING_URI, else <run.dir>/mlflow.db, an SQLite file."""
    experiment: Text = "megarl"
    """Experiment, created if it does not exist."""
    name: Text | None = None
    """Name of the run; null: that of run.dir."""


class TrackioConfig(Section):
    """Trackio."""

    project: Text = "megarl"
    """Trackio project."""
    name: Text | None = None
    """Name of the run; null: that of run.dir."""
    space_id: Text | None = None
    """Hugging Face Space that shows the run; null: files in TRACKIO_DIR, for `trackio show`."""


class SwanlabConfig(Section):
    """SwanLab."""

    project: Text = "megarl"
    """SwanLab project."""
    workspace: Text | None = None
    """SwanLab workspace; null: the account's default."""
    name: Text | None = None
    """Name of the run; null: that of run.dir."""
    mode: Literal["online", "offline"] = "online"
    """offline: write files under the run directory, for `swanlab sync`."""


class LoggingConfig(Section):
    """Sinks in addition to metrics.jsonl, samples/ and report.html (docs/sinks.md)."""

    tensorboard: bool = False
    """Write TensorBoard events to <run.dir>/tensorboard."""
    wandb: Annotated[WandbConfig | None, _SWITCH] = None
    """Send metrics, samples and evaluations to Weights & Biases; true: with its defaults."""
    mlflow: Annotated[MlflowConfig | None, _SWITCH] = None
    """Send metrics, samples and evaluations to MLflow; true: with its defaults."""
    trackio: Annotated[TrackioConfig | None, _SWITCH] = None
    """Send metrics, samples and evaluations to Trackio; true: with its defaults."""
    swanlab: Annotated[SwanlabConfig | None, _SWITCH] = None
    """Send metrics to SwanLab; true: with its defaults."""
    sinks: list[Text] = Field(default_factory=list)
    """Further sinks, each the import path "package.module:Class" of a `megarl.metrics.sink.Sink`."""
    interval: PositiveInt | None = None
    """Steps per line on the console; null: about 1% of the steps, or as many as take 10 s."""
    samples_per_step: NonNegativeInt = 16
    """Samples written to samples/step_N.jsonl per step (0: none)."""
    report_interval: PositiveInt = 10
    """Steps between updates of report.html, also written at the end, and between samples sent to sinks."""

    @rule
    def _dotted(self) -> Problems:
        """`sinks` are import paths."""
        for number, path in enumerate(self.sinks):
            if not is_dotted(path):
                yield f"sinks.{number}", f'must have the form "package.module:Class" (got {path!r})'
