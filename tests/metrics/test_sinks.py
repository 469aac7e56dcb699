"""Read the sinks' files with independent readers, and compare with what was logged."""

from __future__ import annotations

import builtins
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest

from megarl.config.logging import LoggingConfig, MlflowConfig, SwanlabConfig, TrackioConfig, WandbConfig
from megarl.config.section import find_violations
from megarl.errors import UserError
from megarl.metrics.sink import RunInfo, Sink
from megarl.metrics.sinks import build_sinks
from megarl.run_directory import RunDirectory

ROW = {
    "prompt": "1 + 1 =",
    "response": "3",
    "answer": 2,
    "reward": 0.25,
    "finish_reason": "stop",
    "info": {"not": "in the table"},
}


def log_run(path: Path, logging: LoggingConfig, steps: range, after: int | None, offset: float = 0.0) -> None:
    with RunDirectory(path) as run:
        run.open({"run": {"seed": 1}})
        run.start_after(after)
        sinks = build_sinks(logging, run, {"run": {"seed": 1}})
        for step in steps:
            for sink in sinks:
                sink.log(step, {"loss": offset + 1 / (step + 1), "lr": 1e-5 * step})
        for sink in sinks:
            sink.log_rows("samples", steps[-1], [ROW | {"step": steps[-1]}])
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
    config = WandbConfig(project="megarl-test", mode="offline", name="a", group="b", tags=["c", "d"])
    logging = LoggingConfig(wandb=config)
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
    runs = [record.run for file in files for record in finished_wandb_records(file) if record.HasField("run")]
    assert {(run.project, run.display_name, run.run_group, *run.tags) for run in runs} == {
        ("megarl-test", "a", "b", "c", "d")
    }
    tables = [json.loads(path.read_text()) for path in (tmp_path / "wandb").rglob("samples*.table.json")]
    rows = [dict(zip(each["columns"], row, strict=True)) for each in tables for row in each["data"]]
    assert sorted((row["step"], row["response"], row["answer"], row["reward"]) for row in rows) == [
        (2, "3", 2, 0.25),
        (4, "3", 2, 0.25),
    ]


@pytest.mark.parametrize(
    ("module", "logging", "field"),
    [
        ("wandb", LoggingConfig(wandb=WandbConfig(project="p", mode="offline")), r"logging\.wandb"),
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True), r"logging\.tensorboard"),
        ("mlflow", LoggingConfig(mlflow=MlflowConfig()), r"logging\.mlflow.*; pip install mlflow"),
        ("trackio", LoggingConfig(trackio=TrackioConfig()), r"logging\.trackio.*; pip install trackio"),
        ("swanlab", LoggingConfig(swanlab=SwanlabConfig()), r"logging\.swanlab.*; pip install swanlab"),
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


def test_true_is_a_section_of_defaults() -> None:
    read = LoggingConfig.model_validate
    assert read({"wandb": True}) == LoggingConfig(wandb=WandbConfig())
    assert read({"wandb": False, "mlflow": None}) == LoggingConfig()
    assert read({"mlflow": True, "trackio": True, "swanlab": True}) == LoggingConfig(
        mlflow=MlflowConfig(), trackio=TrackioConfig(), swanlab=SwanlabConfig()
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mlflow_keeps_values_settings_and_tables_and_goes_on_after_a_resume(
    tmp_path: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a database without a place of its own keeps artifacts
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}" if elsewhere else None
    logging = LoggingConfig(mlflow=MlflowConfig(experiment="sums", name="a", tracking_uri=uri))
    log_run(tmp_path, logging, range(1, 4), after=None)
    log_run(tmp_path, logging, range(3, 6), after=2)
    client = mlflow.MlflowClient(uri or f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert run.data.params == {"run.seed": "1"}
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert losses == {step: 1 / (step + 1) for step in range(1, 6)}
    file = client.download_artifacts(run.info.run_id, "samples/step_5.json", str(tmp_path))
    table = json.loads(Path(file).read_text())
    shown = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (shown["response"], shown["reward"], "info" in shown) == ("3", 0.25, False)


@pytest.mark.slow
def test_trackio_keeps_the_values(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    steps = _in_a_process(
        tmp_path,
        """
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("megarl", "run")
print(json.dumps([[row["step"], row["loss"]] for row in rows if "loss" in row]))
""",
        "trackio",
    )
    assert steps == [[step, 1 / (step + 1)] for step in (1, 2, 3)]


@pytest.mark.slow
def test_swanlab_offline_keeps_the_values(tmp_path: Path) -> None:
    pytest.importorskip("swanlab")
    _in_a_process(tmp_path, "print([])", "swanlab")
    [file] = (tmp_path / "run" / "swanlab").rglob("*.swanlab")
    stored = file.read_bytes()  # protobuf: values are little-endian doubles
    assert b"loss" in stored
    for step in (1, 2, 3):
        assert struct.pack("<d", 1 / (step + 1)) in stored


def _in_a_process(tmp_path: Path, then: str, sink: str) -> Any:
    """Log steps 1 to 3 of <tmp_path>/run in a process of its own, then print something as JSON."""
    options = "{'mode': 'offline'}" if sink == "swanlab" else "True"
    script = f"""
import json
from pathlib import Path
from megarl.config.logging import LoggingConfig
from tests.metrics.test_sinks import log_run
log_run(Path("run"), LoggingConfig.model_validate({{"{sink}": {options}}}), range(1, 4), after=None)
{then}
"""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *sys.path])
    folders = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    environ = os.environ | {"PYTHONPATH": paths} | folders
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def test_what_trackio_and_swanlab_are_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    for name in ("trackio", "swanlab"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, Table=lambda **_: None))
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda *_, **__: None))
    trackio = TrackioConfig(project="p", name="n", space_id="me/space")
    swanlab = SwanlabConfig(project="q", name="m", workspace="team")
    log_run(tmp_path, LoggingConfig(trackio=trackio, swanlab=swanlab), range(1, 2), after=None)
    first, second = started
    shown = [first[key] for key in ("project", "name", "space_id", "resume")]
    assert shown == ["p", "n", "me/space", "never"]
    shown = [second[key] for key in ("project", "experiment_name", "workspace", "mode")]
    assert shown == ["q", "m", "team", "cloud"]


class Listed(Sink):
    """A sink of this file, named by its import path."""

    said: ClassVar[list[Any]] = []

    def __init__(self, run: RunInfo) -> None:
        if run.resumed_after == 7:
            raise RuntimeError("no room\nat all")
        self.said.append(("start", run.name, run.config, run.resumed_after))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.said.append((step, values["loss"]))

    def close(self) -> None:
        self.said.append("end")


def test_a_sink_by_import_path(tmp_path: Path) -> None:
    Listed.said.clear()
    here = f"{Listed.__module__}:Listed"
    log_run(tmp_path, LoggingConfig(sinks=[here]), range(1, 3), after=None)
    assert Listed.said == [
        ("start", tmp_path.name, {"run": {"seed": 1}}, None),
        (1, 1 / 2),
        (2, 1 / 3),
        "end",
    ]
    with pytest.raises(UserError, match=rf"logging.sinks: {here}: cannot start a run \(no room\)") as caught:
        log_run(tmp_path, LoggingConfig(sinks=[here]), range(8, 9), after=7)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no subclass of megarl.metrics.sink.Sink"):
        log_run(tmp_path, LoggingConfig(sinks=["json:dumps"]), range(8, 9), after=None)
    with pytest.raises(UserError, match="logging.sinks: cannot import nowhere"):
        log_run(tmp_path, LoggingConfig(sinks=["nowhere:Sink"]), range(8, 9), after=None)
    [violation] = find_violations(LoggingConfig(sinks=["mine"]))
    assert "package.module:Class" in violation.message
