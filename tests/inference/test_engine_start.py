"""An engine whose process is killed while it starts: another is started, and after three the run says so."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.actor.engine import ActorEngine
from megarl.inference.actor.process import EngineProcess
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.interface import EngineError


class Starting(EngineProcess):
    """An EngineProcess without Ray: its first ``deaths`` actors die before they have started."""

    def __init__(self, deaths: int, log_path: Path) -> None:
        self.deaths, self.spawned, self.restored = deaths, 0, 0
        self._name, self.log_path = "vLLM", log_path
        self._deaths_in_a_row, self._has_started = 0, False
        self._replacing = threading.Lock()
        self._restore = lambda call: setattr(self, "restored", self.restored + 1)
        self._spawn()

    def _spawn(self) -> None:
        self.spawned += 1
        self.actor: Any = object()

    def kill(self) -> None: ...

    def wait_started(self) -> None:
        if self.spawned <= self.deaths:
            raise RayActorError()


def engine_of(process: EngineProcess) -> Any:
    engine: Any = ActorEngine.__new__(ActorEngine)
    engine._process = process
    return engine


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_it_is_replaced(tmp_path: Path, deaths: int) -> None:
    process = Starting(deaths, tmp_path / "log")
    engine_of(process).wait_ready()
    assert process.spawned == deaths + 1
    assert process._deaths_in_a_row == 0, "later deaths are counted anew"


def test_three_deaths_are_named_with_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("the last words\n")
    process = Starting(9, tmp_path / "log")
    with pytest.raises(
        EngineError, match=r"died while starting, 3 times in a row[\s\S]*the last words"
    ) as caught:
        engine_of(process).wait_ready()
    assert isinstance(caught.value, UserError), "lines, not a traceback"
    assert process.spawned == 3


class Stalled(Starting):
    """Lives, and never starts; says how far it is, once a tenth of a second for so long."""

    def __init__(self, patience: float, log_path: Path, busy_seconds: float = 0.0) -> None:
        super().__init__(0, log_path)
        config = EngineConfig(start_timeout_seconds=patience)
        self._settings = EngineSettings("model", config, "float32", 64, 1, "tmp")
        self._started, began = object(), time.monotonic()
        self.actor = SimpleNamespace(progress=SimpleNamespace(remote=lambda: "progress"))
        self._progress = lambda: round(10 * min(time.monotonic() - began, busy_seconds))

    def value(self, reference: Any, timeout: float | None = None) -> Any:
        if reference == "progress":
            return self._progress()
        time.sleep(min(timeout or 0.0, 0.05))
        raise TimeoutError

    def wait_started(self) -> None:
        EngineProcess.wait_started(self)


@pytest.mark.parametrize(("patience", "busy"), [(0.2, 0.0), (0.6, 0.0), (0.4, 0.8)])
def test_an_engine_that_stalls_while_starting_is_named_in_its_time(
    tmp_path: Path, patience: float, busy: float
) -> None:
    """start_timeout_seconds after its last progress, with what it said last."""
    (tmp_path / "log").write_text("loading libraries\nwaiting for a device\n")
    start = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine_of(Stalled(patience, tmp_path / "log", busy)).wait_ready()
    assert patience + busy <= time.monotonic() - start + 0.11 < patience + busy + 3
    first, *rest = str(caught.value).splitlines()
    assert f"made no progress for {patience:g} s (rollout.engine.start_timeout_seconds)" in first
    assert "its last words: waiting for a device" in first
    assert rest[-1].endswith("waiting for a device")
