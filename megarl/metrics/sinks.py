"""Metric sinks: metrics.jsonl always, TensorBoard and W&B if configured."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

from megarl.config.logging import LoggingConfig, WandbConfig
from megarl.errors import UserError
from megarl.records import StepMetrics
from megarl.run_directory import RunDirectory, write_atomically


class MetricsSink(Protocol):
    """Receives the metrics of each step, on rank 0."""

    def log(self, metrics: StepMetrics) -> None:
        """Record one step."""

    def close(self) -> None:
        """Flush buffers; nothing is logged afterwards."""


def build_sinks(
    logging: LoggingConfig, run_directory: RunDirectory, resolved_config: dict[str, Any]
) -> list[MetricsSink]:
    """Build the sinks of a run, metrics.jsonl first.

    Call it on rank 0 after ``run_directory.start_after``, which sets the first step of the curves.

    Raises:
        UserError: a configured sink cannot be imported or started; the message names the field.
    """
    sinks: list[MetricsSink] = [JsonlSink(run_directory)]
    if logging.tensorboard:
        sinks.append(TensorBoardSink(run_directory))
    if logging.wandb is not None:
        sinks.append(WandbSink(logging.wandb, run_directory, resolved_config))
    return sinks


class JsonlSink:
    """metrics.jsonl; the run directory owns the file."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._run_directory = run_directory

    def log(self, metrics: StepMetrics) -> None:
        """Append the line of the step."""
        self._run_directory.append_metrics(metrics.step, metrics.values)

    def close(self) -> None:
        """Do nothing: every line is already on disk."""


class TensorBoardSink:
    """Scalars in <run.dir>/tensorboard; a resumed run hides the steps it repeats."""

    def __init__(self, run_directory: RunDirectory) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            first_step = 0 if run_directory.started_after is None else run_directory.started_after + 1
            self._writer = SummaryWriter(str(run_directory.tensorboard_path), purge_step=first_step)
        except (ImportError, OSError) as error:
            raise UserError(f"logging.tensorboard: cannot start TensorBoard ({error})") from error

    def log(self, metrics: StepMetrics) -> None:
        """Write one scalar per value and flush, so that a running TensorBoard shows it."""
        for name, value in metrics.values.items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A W&B run that keeps its id across restarts; curves are plotted over ``step``."""

    def __init__(
        self, config: WandbConfig, run_directory: RunDirectory, resolved_config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"logging.wandb: cannot import wandb ({error}); pip install wandb") from error
        folder = run_directory.path / "wandb"
        folder.mkdir(
            exist_ok=True
        )  # if it does not exist, wandb silently falls back to the system's temporary directory
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                dir=str(run_directory.path),
                name=run_directory.path.resolve().name,
                id=_wandb_run_id(folder / "run_id", resumes=run_directory.started_after is not None),
                resume="allow",
                config=resolved_config,
                # console capture would record progress bars character by character
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"logging.wandb: cannot start a run ({reason}); mode: offline needs no account"
            ) from error
        self._run.define_metric("step")
        # W&B drops rows whose counter goes backwards, as after a resume: plot over ``step``.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: StepMetrics) -> None:
        """Send the values of the step as one row."""
        self._run.log({"step": metrics.step, **metrics.values})

    def close(self) -> None:
        """Finish the run; waits until the upload is complete."""
        self._run.finish()


def _wandb_run_id(path: Path, resumes: bool) -> str:
    if not (resumes and path.exists()):
        write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text()
