"""Read the sinks' files with independent readers, and compare with what was logged."""

from __future__ import annotations

import builtins
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from megarl.config.logging import LoggingConfig, WandbConfig
from megarl.errors import UserError
from megarl.metrics.sinks import build_sinks
from megarl.records import StepMetrics
from megarl.run_directory import RunDirectory


def log_run(path: Path, logging: LoggingConfig, steps: range, after: int | None, offset: float = 0.0) -> None:
    with RunDirectory(path) as run:
        run.open({"run": {"seed": 1}})
        run.start_after(after)
        sinks = build_sinks(logging, run, {"run": {"seed": 1}})
        for step in steps:
            for sink in sinks:
                sink.log(StepMetrics(step, {"loss": offset + 1 / (step + 1), "lr": 1e-5 * step}))
        for sink in sinks:
            sink.close()


def test_jsonl_equals_what_was_logged(tmp_path: Path) -> None:
    log_run(tmp_path, LoggingConfig(), range(1, 4), after=None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 1 / (step + 1), "lr": 1e-5 * step} for step in (1, 2, 3)]


def test_tensorboard_reads_back_equal_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(tensorboard=True)
    log_run(tmp_path, logging, range(1, 6), after=None)
    log_run(tmp_path, logging, range(4, 8), after=3, offset=10.0)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    losses = {event.step: event.value for event in accumulator.Scalars("loss")}
    assert len(accumulator.Scalars("loss")) == len(losses)  # the repeated steps 4 and 5 appear once
    expected = {step: 1 / (step + 1) + (10 if step > 3 else 0) for step in range(1, 8)}
    assert losses == pytest.approx(expected, rel=1e-6)  # TensorBoard stores float32
    rates = {event.step: event.value for event in accumulator.Scalars("lr")}
    assert rates == pytest.approx({step: 1e-5 * step for step in range(1, 8)}, rel=1e-6)


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: W&B's 7-byte header, then LevelDB's log format in 32 KiB blocks."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left in the block for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # not written to its end so far
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def finished_wandb_records(path: Path) -> list[Any]:
    """Every record, including the run's exit: W&B's service keeps writing after finish() has returned."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(path)]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} has no exit record after 60 s")


def test_wandb_offline_writes_the_values_and_keeps_its_run_on_resume(tmp_path: Path) -> None:
    logging = LoggingConfig(wandb=WandbConfig(project="megarl-test", mode="offline"))
    log_run(tmp_path, logging, range(1, 3), after=None)
    log_run(tmp_path, logging, range(3, 5), after=2)
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    losses: dict[int, float] = {}
    for record in (record for file in files for record in finished_wandb_records(file)):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "loss" in items:
            losses[items["step"]] = items["loss"]
    assert losses == {step: 1 / (step + 1) for step in range(1, 5)}


@pytest.mark.parametrize(
    ("module", "logging", "field"),
    [
        ("wandb", LoggingConfig(wandb=WandbConfig(project="p", mode="offline")), r"logging\.wandb"),
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True), r"logging\.tensorboard"),
    ],
)
def test_a_sink_that_cannot_be_imported_names_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, logging: LoggingConfig, field: str
) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=field) as caught:
        log_run(tmp_path, logging, range(1, 2), after=None)
    assert "\n" not in str(caught.value)


def test_wandb_online_without_an_account_names_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match=r"logging\.wandb: cannot start a run") as caught:
        log_run(tmp_path / "run", LoggingConfig(wandb=WandbConfig(project="p")), range(1, 2), after=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entity", [None, "a-team"])
def test_the_account_that_a_wandb_run_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entity: str | None
) -> None:
    import wandb

    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        asked.append(arguments)
        return MagicMock()

    monkeypatch.setattr(wandb, "init", init)
    logging = LoggingConfig(wandb=WandbConfig(project="p", mode="offline", entity=entity))
    log_run(tmp_path, logging, range(1, 2), after=None)
    assert [arguments["entity"] for arguments in asked] == [entity]
