"""Adapters with asynchronous rollouts, with a critic, and under a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.end_to_end import test_async
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, checkpoints, column, read_steps, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LORA: dict[str, Any] = {"rank": 8, "alpha": 32.0, "export": "adapter"}
CHECKED = {"weights": {"verify": "checksum"}, "optimizer": {"lr": 5e-3}}


def check(directory: Path, steps: int) -> None:
    """Aliased, in agreement with the engine after every update, and adapters that have learned something."""
    rows = read_steps(directory)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["weights_bytes_moved"] == 0
        assert row["logprob_abs_diff_max"] < 1e-3
    assert max(row["logprob_abs_diff_max"] for row in rows) > 0
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in tensors.values())


def test_samples_of_older_weights(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Merged weights are written while the engine pauses in the middle of its responses."""
    directory = tmp_path / "run"
    sections = test_async.ASYNC | {"lora": LORA} | CHECKED
    config = write_config(
        tmp_path / "grpo.yaml", GRPO, run_dir=directory, model=sft_run.dir / "hf", **sections
    )
    run("grpo", "--config", config, output=tmp_path / "log")
    test_async.check(directory)
    check(directory, test_async.STEPS)


def test_ppo_with_a_critic_of_all_weights(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Stopped after three steps and started again: both models go on, one of them with adapters alone."""
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "ppo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        lora=LORA,
        algorithm={"kl_reward_coef": 0.05, "num_optimizer_steps_per_batch": 2},
        critic={"warmup_steps": 1},
        evaluation={"at_start": False, "at_end": False},
        training={"num_steps": 3},
        **CHECKED,
    )
    run("ppo", "--config", config, output=tmp_path / "1.log")
    output = run("ppo", "--config", config, "training.num_steps=5", output=tmp_path / "2.log")
    assert "(step 3)" in output
    check(directory, 5)
    step = directory / "checkpoints" / checkpoints(directory)[-1]
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.distcp")) for folder in (step, step / "critic")
    ]
    assert sizes[0] < 0.5 * sizes[1]


def test_distillation(tmp_path: Path, model: Path, sft_run: FinishedRun) -> None:
    """A trained student comes closer to a teacher that knows nothing, by its adapters alone.

    (The other way round adapters cannot do it: random embeddings bound how far logits are apart.)
    """
    directory, config = tmp_path / "run", tmp_path / "distill.yaml"
    write_config(
        config,
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        lora=LORA,
        teacher={"path": str(model)},
        evaluation={"at_start": False, "at_end": False},
        training={"num_steps": 20},
        checkpoint={"interval": 0},
        **CHECKED,
    )
    run("distill", "--config", config, output=tmp_path / "log")
    check(directory, 20)
    losses = column(directory, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
