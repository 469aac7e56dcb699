"""Runs that train adapters: exports, engine, and resuming after a stop."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
    GRPO,
    SFT,
    Command,
    checkpoints,
    column,
    read_steps,
    read_summary,
    run,
    write_config,
)
from tests.end_to_end.test_sft import validation_loss_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LORA: dict[str, Any] = {"rank": 8, "alpha": 32.0}
FASTER = {"lr": 1e-2}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def sft_lora(workspace: Path, sft_run: FinishedRun) -> FinishedRun:
    """Adapters on the model of the full run, trained on new problems."""
    directory = workspace / "sft_lora"
    config = write_config(
        workspace / "sft_lora.yaml",
        SFT,
        run_dir=directory,
        model=sft_run.dir / "hf",
        lora=LORA,
        optimizer=FASTER,
    )
    return FinishedRun(directory, config, run("sft", "--config", config, output=workspace / "sft_lora.log"))


def test_both_exports_are_the_policy(sft_run: FinishedRun, sft_lora: FinishedRun) -> None:
    losses = column(sft_lora.dir, "loss")
    assert losses[-1] < 0.95 * losses[0]
    assert "parameters are trained" in sft_lora.output
    expected = read_summary(sft_lora.dir)["validation_loss"]
    assert expected < read_summary(sft_run.dir)["validation_loss"] - 0.01
    merged = transformers.AutoModelForCausalLM.from_pretrained(sft_lora.dir / "hf", dtype=torch.float32)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(sft_lora.dir / "adapter", dtype=torch.float32)
    for model in (merged, adapted):
        assert validation_loss_of(model, sft_lora.dir / "hf") == pytest.approx(expected, abs=1e-4)


def test_checkpoints_hold_adapters_and_runs_go_on(
    tmp_path: Path, sft_run: FinishedRun, sft_lora: FinishedRun
) -> None:
    def size(where: Path) -> int:
        [step] = (where / "checkpoints").iterdir()
        return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())

    assert size(sft_lora.dir) < 0.5 * size(sft_run.dir)
    directory, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(sft_run.dir / "hf", base)
    config = write_config(
        tmp_path / "sft.yaml",
        SFT,
        run_dir=directory,
        model=base,
        lora=LORA | {"export": "adapter"},
        optimizer=FASTER,
    )
    command = Command("sft", "--config", config, output=tmp_path / "1.log")
    command.wait_until(lambda: len(read_steps(directory)) >= 5)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 143, command.output
    output = run("sft", "--config", config, "parallel.num_processes=2", output=tmp_path / "2.log")
    assert "Resuming from" in output
    ours, whole = column(directory, "loss"), column(sft_lora.dir, "loss")
    assert ours == pytest.approx(whole, abs=2e-5)
    assert not (directory / "hf").exists()
    assert (directory / "adapter" / "adapter_model.safetensors").is_file()

    other = Command("sft", "--config", config, "lora.rank=4", output=tmp_path / "3.log")
    assert other.wait() == 2
    assert "lora.rank (was 8, now 4)" in other.output
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors")
    other = Command("sft", "--config", config, "training.num_steps=50", output=tmp_path / "4.log")
    assert other.wait() == 2
    assert f"model.path: {base} holds other weights than when this run began" in other.output


@pytest.mark.parametrize(
    "parallel", [{}, {"num_processes": 2, "pipeline_parallel_size": 2}], ids=["one", "pp2"]
)
def test_the_engine_samples_from_the_merged_policy(
    tmp_path: Path, sft_run: FinishedRun, parallel: dict[str, Any]
) -> None:
    """A reference in the loss, several optimizer steps per batch, checksums after every weight sync."""
    directory, base = tmp_path / "run", sft_run.dir / "hf"
    before = digest(base / "model.safetensors")
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=base,
        lora=LORA,
        parallel=parallel,
        algorithm={"kl_coef": 0.1, "num_optimizer_steps_per_batch": 2},
        weights={"verify": "checksum"},
        optimizer={"lr": 5e-3},
    )
    output = run("grpo", "--config", config, output=tmp_path / "run.log")
    steps = read_steps(directory)
    assert len(steps) == GRPO["training"]["num_steps"]
    for step in steps:
        assert step["weights_bytes_moved"] == 0
        assert 0 < step["logprob_abs_diff_max"] < 1e-3
    # The policy has left its reference, so the agreement above is that of weights with adapters in them.
    kls = column(directory, "kl_ref")
    assert kls[0] < kls[-1]
    assert kls[-1] > 1e-4
    assert "parameters are the trainer's memory" in output
    assert digest(base / "model.safetensors") == before
    evaluated = read_summary(directory)
    assert evaluated["accuracy_after"] >= 0


def test_a_checkpoint_is_converted_to_the_merged_model(tmp_path: Path, sft_lora: FinishedRun) -> None:
    """Bit for bit what the run itself exported."""
    [step] = (sft_lora.dir / "checkpoints").iterdir()
    run("convert", "megatron-to-hf", step, tmp_path / "hf", "--verify", output=tmp_path / "convert.log")
    ours, theirs = (load_file(where / "hf" / "model.safetensors") for where in (tmp_path, sft_lora.dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "MegaRL" in run("convert", "inspect", step, output=tmp_path / "inspect.log")


def test_dpo_starts_from_the_reference(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Untrained adapters change nothing: the first loss is that of equal policies, log 2."""
    pairs = {k: v for k, v in SFT["data"].items() if k != "held_out"}
    config = write_config(
        tmp_path / "dpo.yaml",
        SFT | {"data": pairs, "training": {"num_steps": 8, "batch_size": 8}},
        packing={"max_sequence_length": 80},
        run_dir=tmp_path / "run",
        model=sft_run.dir / "hf",
        lora=LORA,
    )
    run("dpo", "--config", config, output=tmp_path / "dpo.log")
    losses = column(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.68
    assert checkpoints(tmp_path / "run") == ["step_8"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
