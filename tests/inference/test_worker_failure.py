"""A dead worker process ends the actor's process; other errors reach the caller. vLLM is stood in for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.inference.vllm.worker_failure import lost_worker

ACTOR = """
import sys
from types import SimpleNamespace
from megarl.config.rollout import EngineConfig
from megarl.inference.vllm import worker
from megarl.inference.actor.settings import EngineSettings

class Engine:
    model_executor = SimpleNamespace(is_failed=False, workers=[])
    calls = 0

    def collective_rpc(self, name):
        if name == "megarl_shared_memory":
            return []
        self.model_executor.is_failed = sys.argv[2] == "dead"
        raise RuntimeError("cancelled")

worker.build_engine = lambda settings: Engine()
settings = EngineSettings("", EngineConfig(), "float32", 8, 1, sys.argv[1])
actor = worker.VllmEngineActor(settings, sys.argv[1] + "/log")
actor.wait_started()
try:
    actor.describe_parameters()
except RuntimeError as error:
    print("the caller got", repr(error), flush=True)
    sys.exit(3)
"""


@pytest.fixture
def executor() -> Iterator[Any]:
    """Two worker processes that wait, as vLLM's MultiprocExecutor holds them."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    yield SimpleNamespace(is_failed=False, workers=[SimpleNamespace(proc=p) for p in processes])
    for process in processes:
        process.kill()
        process.join()


def test_a_worker_that_dies_while_waited_for_is_lost(executor: Any) -> None:
    assert not lost_worker(executor, 0.2)
    pid = executor.workers[1].proc.pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    assert lost_worker(executor, 20.0)
    assert lost_worker(executor, 0.0)


def test_a_failed_executor_has_lost_one(executor: Any) -> None:
    executor.is_failed = True
    assert lost_worker(executor, 0.0)


def test_an_executor_in_the_engines_own_process_has_none_to_lose() -> None:
    began = time.monotonic()
    assert not lost_worker(SimpleNamespace(), 20.0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("state", "code", "written"),
    [
        ("dead", 1, "A worker process of the engine is dead"),
        ("alive", 3, "the caller got RuntimeError('cancelled')"),
    ],
)
def test_what_becomes_of_the_actor(tmp_path: Path, state: str, code: int, written: str) -> None:
    command = [sys.executable, "-c", ACTOR, str(tmp_path), state]
    assert subprocess.run(command, timeout=120).returncode == code
    assert written in (tmp_path / "log").read_text()
