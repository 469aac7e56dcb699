"""A worker of an environment: how many answers it judges at a time, how long it may take to start."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from megarl.config.data import JsonlSource
from megarl.config.environments import CodeConfig, EnvironmentRuntime, JudgeConfig
from megarl.environments import sandbox
from megarl.environments.judge import JudgeEnvironment
from megarl.environments.process import EnvironmentFailureError, WorkerProcess
from megarl.environments.sandbox_streams import Finished
from megarl.environments.worker import Answers, EnvironmentActor
from megarl.records import Prompt, token_ids

CASE = {"cases": [{"input": "", "output": "1"}]}


class AtOnce:
    """Counts who is inside."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1


def judge_all(environment: CodeConfig | JudgeConfig, count: int) -> None:
    source = JsonlSource(source="jsonl", path="unused", environment=environment)
    actor = EnvironmentActor(source, "data.train", 60.0, [], lambda sampled, raw=False: "1")
    prompt = Prompt(0, "p", token_ids([1]), {"entry": CASE, "answer": "1"})
    answers = Answers([prompt], [0] * count, token_ids([1] * count), np.arange(count + 1))

    async def judged() -> int:
        found = [judgement async for some in actor.judge(answers) for judgement in some]
        assert [each.failure for each in found] == [""] * count
        return len(found)

    assert asyncio.run(judged()) == count


@pytest.mark.parametrize("most", [2, 5])
def test_programs_that_run_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = AtOnce()

    def run(*_: Any) -> Finished:
        with at_once:
            time.sleep(0.05)
        return Finished("exited", 0, b"1", b"")

    monkeypatch.setattr(sandbox, "choose", lambda *_: "namespaces")
    monkeypatch.setattr(sandbox, "not_held", lambda _: ())
    monkeypatch.setattr(sandbox, "run", run)
    judge_all(CodeConfig(kind="code", max_concurrency=most), 12)
    assert at_once.most == most


@pytest.mark.parametrize("most", [2, 5])
def test_requests_to_a_judge_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = AtOnce()

    async def ask(self: JudgeEnvironment, text: str) -> tuple[str, str]:
        with at_once:
            await asyncio.sleep(0.02)
        return "Score: 5", ""

    monkeypatch.setattr(JudgeEnvironment, "_ask", ask)
    config = JudgeConfig(kind="judge", base_url="http://127.0.0.1:9/v1", model="m", max_concurrency=most)
    judge_all(config, 12)
    assert at_once.most == most


@pytest.mark.parametrize("seconds", [0.05, 0.4])
def test_a_successor_that_does_not_start_is_ended_in_its_own_time(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By start_timeout_seconds, which is not that of a call; the message has the one that was exceeded."""
    process = WorkerProcess.__new__(WorkerProcess)
    process._runtime = EnvironmentRuntime(timeout_seconds=90.0, start_timeout_seconds=seconds)
    process._field, process.generation, process.num_replaced, process.facts = "data.train", 1, 0, None
    process.actor = type("Actor", (), {"facts": type("Facts", (), {"remote": staticmethod(lambda: None)})})
    spawned: list[int] = []
    monkeypatch.setattr(process, "kill", lambda: None)
    monkeypatch.setattr(process, "_spawn", lambda: spawned.append(1))
    monkeypatch.setattr("megarl.environments.process.answer", lambda _: asyncio.sleep(60))
    start = time.monotonic()
    with pytest.raises(EnvironmentFailureError, match=f"not started within {seconds:g} s; its process was"):
        asyncio.run(process.ready())
    assert seconds <= time.monotonic() - start < seconds + 5
    assert spawned == [1]
