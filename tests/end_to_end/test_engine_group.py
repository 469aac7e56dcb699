"""Runs with two engines learn bit for bit the same as runs with one."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, Command, column, read_steps, run, write_config
from tests.processes import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 2
TWO = "rollout.engine.data_parallel_size=2"
LEARNED = ("loss", "grad_norm", "reward_mean", "num_tokens", "response_length_mean")


def grpo_config(folder: Path, model: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    evaluation = {"num_prompts": 8, "temperature": 1.0, "num_samples_per_prompt": 2}
    settings = {"training": {"num_steps": STEPS}, "evaluation": evaluation} | sections
    checkpoint = {"interval": 0, "export_hf": False}
    return write_config(
        folder / "grpo.yaml", GRPO, run_dir=folder / "run", model=model, checkpoint=checkpoint, **settings
    )


def learned(folder: Path, steps: int = STEPS) -> dict[str, list[float]]:
    lines = read_steps(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    found = {name: column(folder / "run", name) for name in LEARNED if name in lines[0]}
    found["accuracy"] = [line["accuracy"] for line in lines if "accuracy" in line]
    assert found["loss"] and found["accuracy"]
    return found


@pytest.fixture(scope="module")
def one_engine(tmp_path_factory: pytest.TempPathFactory, sft_run: FinishedRun) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run("grpo", "--config", grpo_config(folder, sft_run.dir / "hf"), output=folder / "log")
    return folder


def test_two_engines_train_as_one(tmp_path: Path, sft_run: FinishedRun, one_engine: Path) -> None:
    config = grpo_config(tmp_path, sft_run.dir / "hf")
    command = Command("grpo", "--config", config, TWO, "weights.verify=checksum", output=tmp_path / "log")
    try:
        assert command.wait() == 0, command.output
    finally:
        command.kill()
    assert learned(tmp_path) == learned(one_engine)
    assert column(tmp_path / "run", "weights_bytes_moved") == [0] * STEPS
    for rank in range(2):
        assert re.search(rf"engine rank {rank}: \d+ parameters are the trainer's memory", command.output)
    assert "are copied at every step" not in command.output
    logs = sorted(path.name for path in (tmp_path / "run").glob("engine*.log"))
    assert logs == ["engine-0.log", "engine-1.log"]
    # Segments have the name of the process that made them, and go with the last of those that map them.
    deadline = time.monotonic() + 20
    while left := list(Path("/dev/shm").glob(f"torch_{command.process.pid}_*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_two_engines_beside_two_ranks(tmp_path: Path, sft_run: FinishedRun) -> None:
    found = []
    for name, options in (("one", []), ("two", [TWO])):
        config = grpo_config(tmp_path / name, sft_run.dir / "hf", parallel={"num_processes": 2})
        run("grpo", "--config", config, *options, output=tmp_path / f"{name}.log")
        found.append(learned(tmp_path / name))
    assert found[0] == found[1]


def test_two_engines_run_ahead_of_training(tmp_path: Path, sft_run: FinishedRun) -> None:
    """They pause, get the new version and go on: no sample is older than allowed, fresh ones agree."""
    config = grpo_config(tmp_path, sft_run.dir / "hf", training={"num_steps": 4})
    options = ["rollout.max_staleness=1", "rollout.max_new_tokens=32"]
    options += ["algorithm.off_policy_correction=tis", "algorithm.off_policy_high=2.0"]
    run("grpo", "--config", config, TWO, *options, output=tmp_path / "log")
    steps = read_steps(tmp_path / "run")
    assert [step["staleness_max"] for step in steps] == [0, 1, 1, 1]
    assert all(step["logprob_abs_diff_max"] < 1e-3 for step in steps)
    assert column(tmp_path / "run", "weights_bytes_moved") == [0] * 4


def test_a_killed_engine_of_two_is_replaced(tmp_path: Path, sft_run: FinishedRun) -> None:
    steps, results = 6, []
    for name, kills in (("calm", False), ("killed", True)):
        config = grpo_config(tmp_path / name, sft_run.dir / "hf", training={"num_steps": steps})
        command = Command("grpo", "--config", config, TWO, output=tmp_path / f"{name}.log")
        try:
            if kills:
                command.wait_until(lambda: len(read_steps(tmp_path / "killed" / "run")) >= 2)
                family = psutil.Process(command.process.pid).children(recursive=True)
                actors = [p for p in family if "EngineActor" in command_line(p)]
                assert len(actors) == 2
                actors[-1].send_signal(signal.SIGKILL)
            assert command.wait(600) == 0, command.output
        finally:
            command.kill()
        assert ("The vLLM engine died" in command.output) == kills
        results.append(learned(tmp_path / name, steps))
    assert results[0] == results[1]


def test_eval_with_two_engines(tmp_path: Path, sft_run: FinishedRun) -> None:
    config = tmp_path / "eval.yaml"
    source = GRPO["data"]
    config.write_text(
        f"""
run: {{dir: {tmp_path / "run"}}}
model: {{path: {sft_run.dir / "hf"}}}
data: {{held_out: {source["held_out"]}, format: {{chat_template: false}}}}
rollout: {{max_new_tokens: 6, engine: {{kv_cache_gib: 0.05, num_threads: 1}}}}
evaluation: {{num_prompts: 16, num_samples_per_prompt: 4, temperature: 1.0, k: [1, 4]}}
"""
    )
    rows = []
    for name, options in (("one", []), ("two", [TWO])):
        directory = f"run.dir={tmp_path / name}"
        run("eval", "--config", config, directory, *options, output=tmp_path / f"{name}.log")
        rows.append((tmp_path / name / "samples" / "step_0.jsonl").read_text())
    assert rows[0] == rows[1] and rows[0]
