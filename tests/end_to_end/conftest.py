"""A tiny model, and the two runs that most tests use or compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.harness import GRPO, SFT, make_model, run, write_config


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, the configuration it came from, and what the command printed."""

    dir: Path
    config: Path
    output: str


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="session")
def model(workspace: Path) -> Path:
    """Two layers, hidden 64, a real tokenizer."""
    return make_model(workspace / "model")


@pytest.fixture(scope="session")
def sft_run(workspace: Path, model: Path) -> FinishedRun:
    """An uninterrupted SFT run on one process."""
    directory = workspace / "sft"
    config = write_config(workspace / "sft.yaml", SFT, run_dir=directory, model=model)
    return FinishedRun(directory, config, run("sft", "--config", config, output=workspace / "sft.log"))


@pytest.fixture(scope="session")
def grpo_run(workspace: Path, sft_run: FinishedRun) -> FinishedRun:
    """An uninterrupted GRPO run with a vLLM engine, one optimizer step per batch, from the SFT model."""
    directory = workspace / "grpo"
    config = write_config(workspace / "grpo.yaml", GRPO, run_dir=directory, model=sft_run.dir / "hf")
    return FinishedRun(directory, config, run("grpo", "--config", config, output=workspace / "grpo.log"))
