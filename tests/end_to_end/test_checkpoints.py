"""`megarl sft` and its checkpoints: killed while saving, kept for being the best, read by another layout."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import SFT, Command, checkpoints, column, read_steps, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = SFT["training"]["num_steps"]


def complete(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    names = [name for name in checkpoints(directory) if not name.startswith(".")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def being_written(directory: Path) -> bool:
    return any(name.endswith(".partial") for name in checkpoints(directory))


def test_killed_ten_times_while_saving(tmp_path: Path, model: Path, sft_run: FinishedRun) -> None:
    """SIGKILL at ten random moments of a save, in the background or not; the run still ends as if alone."""
    directory, draw = tmp_path / "run", random.Random(7)
    config = write_config(
        tmp_path / "sft.yaml", SFT, run_dir=directory, model=model, checkpoint={"interval": 1, "keep": 2}
    )
    during = 0
    for attempt in range(10):
        before = max(complete(directory), default=0)
        option = f"checkpoint.async_save={str(attempt % 2 == 0).lower()}"
        command = Command("sft", "--config", config, option, output=tmp_path / f"{attempt}.log")
        command.wait_until(lambda before=before: before + 1 in complete(directory))  # type: ignore[misc]
        command.wait_until(lambda: being_written(directory))
        time.sleep(draw.uniform(0, 0.1))
        command.kill()
        during += being_written(directory)
        assert len(complete(directory)) >= 1
        if attempt:
            assert f"(step {before})" in command.output
    assert during >= 3  # moments are random; most of them lie within a save

    option = "checkpoint.async_save=true"
    output = run("sft", "--config", config, option, output=tmp_path / "last.log")
    assert f"checkpoint step_{STEPS}: steps waited" in output
    for name in ("loss", "grad_norm", "lr"):
        assert column(directory, name) == column(sft_run.dir, name)
    assert complete(directory) == [STEPS - 1, STEPS]
    steps = read_steps(directory)  # every other attempt saved without a background, and so did not wait
    blocked = [step["seconds_checkpoint_blocked"] for step in steps if "seconds_checkpoint_blocked" in step]
    assert all(seconds >= 0 for seconds in blocked)
    assert sum(blocked) > 0


def test_the_best_checkpoint_stays(tmp_path: Path, model: Path) -> None:
    """The gradient norm is largest early on: that checkpoint outlives newer ones."""
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "sft.yaml",
        SFT,
        run_dir=directory,
        model=model,
        training={"num_steps": 12},
        checkpoint={
            "interval": 2,
            "keep": 1,
            "async_save": True,
            "keep_best_metric": "validation_loss",
            "keep_best_mode": "max",
        },
    )
    output = run("sft", "--config", config, "training.validation_interval=4", output=tmp_path / "log")
    values = {line["step"]: line.get("validation_loss") for line in read_steps(directory)}
    best = max((step for step in (4, 8, 12)), key=lambda step: values[step])
    assert best == 4  # the loss falls, and the largest one was asked for
    assert complete(directory) == [best, 12]
    assert "step 2 has no validation_loss, so its checkpoint cannot be the best" in output


def test_two_pipeline_ranks_go_on_alone(tmp_path: Path, model: Path, sft_run: FinishedRun) -> None:
    """The same file with another layout on the command line: the run reports it and resumes."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=directory, model=model)
    layout = ["parallel.num_processes=2", "parallel.pipeline_parallel_size=2"]
    run("sft", "--config", config, *layout, "training.num_steps=6", output=tmp_path / "1.log")
    output = run("sft", "--config", config, "training.num_steps=12", output=tmp_path / "2.log")
    assert "parallel.pipeline_parallel_size (was 2, now 1)" in output
    assert "random states start anew" in output
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        ours, alone = column(directory, name), column(sft_run.dir, name)[:12]
        assert ours == pytest.approx(alone, abs=tolerance)
