"""A run of one backend starts from the checkpoints of a run of the other, as from its exported model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import SFT, Command, column, run, write_config


def losses(tmp_path: Path, name: str, model: Path, *overrides: str) -> list[float]:
    training = SFT["training"] | {"num_steps": 2}
    config = write_config(
        tmp_path / f"{name}.yaml", SFT, run_dir=tmp_path / name, model=model, training=training
    )
    run("sft", "--config", config, *overrides, output=tmp_path / f"{name}.log")
    return [*column(tmp_path / name, "loss"), *column(tmp_path / name, "grad_norm")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_megatron_to_torch_and_back(tmp_path: Path, sft_run: FinishedRun) -> None:
    torch = ("trainer.backend=torch", "parallel.num_processes=2")
    there = losses(tmp_path, "torch", sft_run.dir, *torch)
    assert there == losses(tmp_path, "torch-hf", sft_run.dir / "hf", *torch)
    back = losses(tmp_path, "megatron", tmp_path / "torch")
    assert back == losses(tmp_path, "megatron-hf", tmp_path / "torch" / "hf")
    assert there[0] != back[0]
    output = tmp_path / "dry.log"
    assert "complete, 2 of 2" in run("sft", "-c", tmp_path / "torch.yaml", *torch, "--dry-run", output=output)
    again = Command(
        *("sft", "--config", tmp_path / "megatron.yaml", "trainer.backend=torch", "training.num_steps=3"),
        output=tmp_path / "again.log",
    )
    assert again.wait() == 2
    (error,) = (line for line in again.output.splitlines() if line.startswith("error"))
    assert "trainer.backend" in error and "started with other values" in error
