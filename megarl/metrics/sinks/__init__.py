"""The sinks of a run: metrics.jsonl always, others if configured; their libraries are imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megarl.config.dotted import load_dotted
from megarl.config.logging import LoggingConfig
from megarl.errors import UserError
from megarl.metrics.sink import RunInfo, Sink
from megarl.metrics.sinks.jsonl import JsonlSink
from megarl.run_directory import RunDirectory


def build_sinks(
    logging: LoggingConfig, run_directory: RunDirectory, resolved_config: dict[str, Any]
) -> list[Sink]:
    """Build the sinks of a run, metrics.jsonl first.

    Call it on rank 0 after ``run_directory.start_after``, which sets the first step of the curves.

    Raises:
        UserError: a configured sink cannot be imported or started; the message names the field.
    """
    run = RunInfo(run_directory.path, resolved_config, run_directory.started_after)
    return [JsonlSink(run_directory), *_configured(logging, run)]


def _configured(logging: LoggingConfig, run: RunInfo) -> Iterator[Sink]:
    for name, class_name, options in (  # module here, which is the key's name; its class
        ("tensorboard", "TensorBoardSink", logging.tensorboard),
        ("wandb", "WandbSink", logging.wandb),
        ("mlflow", "MlflowSink", logging.mlflow),
        ("trackio", "TrackioSink", logging.trackio),
        ("swanlab", "SwanlabSink", logging.swanlab),
    ):
        if options:
            made = getattr(importlib.import_module(f"megarl.metrics.sinks.{name}"), class_name)
            yield _start(f"logging.{name}", name, partial(made, run, options))
    for path in logging.sinks:
        made = load_dotted(path, "logging.sinks")
        if not (isinstance(made, type) and issubclass(made, Sink)):
            raise UserError(f"logging.sinks: {path} is no subclass of megarl.metrics.sink.Sink")
        yield _start(f"logging.sinks: {path}", None, partial(made, run))


def _start(field: str, package: str | None, make: Callable[[], Sink]) -> Sink:
    """Build a sink; every failure is one line."""
    try:
        return make()
    except UserError:
        raise
    except ImportError as error:
        install = f"; pip install {package}" if package else ""
        raise UserError(f"{field}: cannot import {error.name or package} ({error}){install}") from error
    except Exception as error:  # whatever a library raises without an account, a server or a disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "; mode: offline needs no account" if package in ("wandb", "swanlab") else ""
        raise UserError(f"{field}: cannot start a run ({reason}){hint}") from error
