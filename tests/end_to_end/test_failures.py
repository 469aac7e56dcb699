"""Runs whose processes are killed or stopped: how they end, their messages, and that nothing is left."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.environments.math import MathEnvironment
from megarl.records import Prompt
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
    GRPO,
    SFT,
    Command,
    make_model,
    read_lines,
    read_steps,
    write_config,
)
from tests.processes import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HANG_TIMEOUT = 6.0
END_WITHIN = 60.0  # seconds, on a machine that does other things as well


def beat(directory: Path, rank: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "ranks" / f"rank_{rank:05}.json").read_text())
    return values


def shared_memory() -> set[str]:
    """Return the files through which torch, vLLM and Python's multiprocessing share memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def mapped_shared_memory() -> set[str]:
    """Return those of the files that a living process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found.update(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
        except OSError:  # it has ended meanwhile
            continue
    return found


def family(command: Command) -> list[psutil.Process]:
    """Return every process of the run and its listeners."""
    parent = psutil.Process(command.process.pid)
    return [parent, *parent.children(recursive=True)]


def check_nothing_is_left(processes: list[psutil.Process], before: set[str]) -> None:
    """Assert that no process (except zombies, which wait for their parent), port or shared memory is left."""
    deadline = time.monotonic() + 30
    while True:
        alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        left = {name for name in shared_memory() - before if name.startswith(("torch_", "psm_", "sem."))}
        left -= mapped_shared_memory() if left and not alive else set()  # other programs run here too
        if not alive and not left:
            return
        assert time.monotonic() < deadline, f"left behind: {alive}, {left}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two key/value heads, for an engine of two tensor ranks."""
    return make_model(tmp_path_factory.mktemp("two_heads") / "model", kv_heads=2)


def start_sft(folder: Path, model: Path, *options: str) -> Command:
    config = write_config(
        folder / "sft.yaml",
        SFT,
        run_dir=folder / "run",
        model=model,
        training={"num_steps": 100_000},
        parallel={"num_processes": 2, "pipeline_parallel_size": 2},
    )
    command = Command("sft", "--config", config, *options, output=folder / "log")
    command.wait_until(lambda: len(read_steps(folder / "run")) >= 3)
    return command


@pytest.mark.parametrize("launcher", ["auto", "ray"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(tmp_path: Path, model: Path, rank: int, launcher: str) -> None:
    before = shared_memory()
    command = start_sft(tmp_path, model, f"launcher={launcher}")
    processes = family(command)
    victim = beat(tmp_path / "run", rank)
    psutil.Process(victim["pid"]).kill()
    began = time.monotonic()
    assert command.wait(END_WITHIN) != 0
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    name = f"rank {rank} (host {victim['host']}, process {victim['pid']})"
    assert f"error: {name} was killed by SIGKILL; last seen in step " in command.output or (
        f"error: {name} has died; last seen in step " in command.output
    ), command.output
    assert "phase train" in command.output or "between phases" in command.output
    check_nothing_is_left(processes, before)


def test_a_stopped_rank_ends_the_run(tmp_path: Path, model: Path) -> None:
    """Rank 1 is stopped; rank 0 waits in a collective until the time-out."""
    before = shared_memory()
    command = start_sft(tmp_path, model, f"run.hang_timeout_seconds={HANG_TIMEOUT}")
    processes = family(command)
    victim = psutil.Process(beat(tmp_path / "run", 1)["pid"])
    victim.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert command.wait(HANG_TIMEOUT + END_WITHIN) != 0
    assert time.monotonic() - began >= HANG_TIMEOUT
    said = f"process {victim.pid}) has sent no heartbeat for"
    assert said in command.output, command.output
    assert "ranks 0: step" in command.output
    failure = (tmp_path / "run" / "ranks" / "failure.txt").read_text()
    assert said in failure
    # Where rank 0 was waiting is on disk too.
    assert "in run_sft" in (tmp_path / "run" / "ranks" / "rank_00000.traceback").read_text()
    check_nothing_is_left(processes, before)


def engine_processes(command: Command) -> list[psutil.Process]:
    """Return the engine's actor, and its workers if it has several ranks."""
    kinds = ("EngineActor", "VLLM::Worker", "multiprocessing.spawn")
    return [p for p in family(command) if any(kind in command_line(p) for kind in kinds)]


@pytest.mark.parametrize("victim", ["actor", "worker", "rank"])
def test_a_killed_engine_process(tmp_path: Path, two_heads: Path, victim: str) -> None:
    """An engine of two tensor ranks: the run continues with a new one; a killed trainer ends it too."""
    before = shared_memory()
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=tmp_path / "run",
        model=two_heads,
        training={"num_steps": 6},
        evaluation={"at_start": False, "at_end": False},
        checkpoint={"interval": 0, "export_hf": False},
    )
    tensor_parallel = "rollout.engine.tensor_parallel_size=2"
    options = [] if victim == "rank" else [tensor_parallel]
    command = Command("grpo", "--config", config, *options, output=tmp_path / "log")
    try:
        command.wait_until(lambda: len(read_steps(tmp_path / "run")) >= 2)
        processes = family(command)
        if victim == "rank":
            command.kill()
        else:
            kinds = ("EngineActor",) if victim == "actor" else ("VLLM::Worker", "multiprocessing.spawn")
            found = [p for p in engine_processes(command) if any(k in command_line(p) for k in kinds)]
            assert found, [command_line(p) for p in processes]
            found[0].kill()
            code = command.wait(600)
            print(command.output)
            if code == 0:
                assert "The vLLM engine died" in command.output
                assert len(read_steps(tmp_path / "run")) == 6
            else:  # named, with the engine's log
                assert "the vLLM engine failed" in command.output
        check_nothing_is_left(processes, before)
    finally:
        command.kill()


def _judged_again(path: Path) -> int:
    """Check every reward of a step's samples with an independent verifier; return their number."""
    judge, samples = MathEnvironment(), read_lines(path)
    for sample in samples:
        a, b = (int(term) for term in sample["prompt"].removesuffix(" =").split(" + "))
        prompt = Prompt(0, sample["prompt"], [], {"answer": str(a + b)})
        assert sample["reward"] == asyncio.run(judge.judge(prompt, sample["response"]))[0]
    judge.close()
    return len(samples)


def test_a_killed_verifier_is_replaced(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Its episode is graded again, and counted; no reward of 0 replaces the verifier's."""
    before = shared_memory()
    problems = tmp_path / "problems.jsonl"
    rows = ({"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(9) for b in range(9))
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "path": str(problems), "environment": {"kind": "math"}}
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=tmp_path / "run",
        model=sft_run.dir / "hf",
        data={"train": data, "held_out": None},
        training={"num_steps": 12},
        evaluation={"at_start": False, "at_end": False},
        checkpoint={"interval": 0, "export_hf": False},
    )
    command = Command("grpo", "--config", config, output=tmp_path / "log")
    try:
        command.wait_until(lambda: len(read_steps(tmp_path / "run")) >= 2)
        processes = family(command)
        [worker] = [p for p in processes if "math_worker.py" in command_line(p)]
        worker.kill()
        assert command.wait() == 0, command.output
        steps = read_steps(tmp_path / "run")
        assert len(steps) == 12
        assert sum(step["episodes_retried"] for step in steps) >= 1
        assert sum(step["episodes_dropped"] for step in steps) == 0
        assert sum(map(_judged_again, (tmp_path / "run" / "samples").glob("step_*.jsonl"))) > 0
        check_nothing_is_left(processes, before)
    finally:
        command.kill()
