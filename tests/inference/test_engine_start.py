"""An engine whose process is killed while it starts: another is started, and after three the run says so."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from megarl.errors import UserError
from megarl.inference.actor.engine import ActorEngine
from megarl.inference.actor.process import EngineProcess
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
