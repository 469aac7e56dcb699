"""A run with non-finite values ends at once, with one line, and overwrites no good checkpoint.

The weight decay causes it: with a warm-up the first step has lr 0, so step 1 is good, and after step 2 most
weights are infinite.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.harness import GRPO, ROOT, SFT, TASK, Command, checkpoints, read_steps, write_config

pytestmark = pytest.mark.timeout(1800)

# The configuration refuses such a weight decay; here the bounds are lifted in every process.
NO_BOUNDS = """
from megarl.config import section
bound = section.at_most
section.at_most = lambda limit: bound(1e308)
section.MAX_NUMBER = 1e308
"""
POISON = {"lr": 1e-3, "lr_warmup_steps": 2, "weight_decay": 1e300}
EVERY_STEP = {"interval": 1, "keep": 2, "export_hf": True}
TEMPLATES = {"chosen_templates": ["{answer}"], "rejected_templates": ["{other_answer}"]}
PAIRS = {
    "data": {
        "train": {**TASK, "size": 64, "seed": 1, "partial_credit": False, **TEMPLATES},
        "format": {"chat_template": False},
    },
    "packing": {"max_tokens_per_microbatch": 320, "max_sequence_length": 96},
}
ONLINE = GRPO | {"evaluation": {"at_start": False, "at_end": False}, "data": GRPO["data"]}


@pytest.fixture(autouse=True)
def _no_bounds(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("no_bounds")
    (folder / "sitecustomize.py").write_text(NO_BOUNDS)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def poisoned(tmp_path: Path, model: Path, job: str, base: dict[str, Any], **sections: Any) -> Command:
    """A run of six steps that has ended."""
    config = write_config(
        tmp_path / "config.yaml",
        base,
        run_dir=tmp_path / "run",
        model=model,
        training={"num_steps": 6, **({} if base is ONLINE else {"batch_size": 8})},
        **{"optimizer": POISON, "checkpoint": EVERY_STEP} | sections,
    )
    command = Command(job, "--config", config, output=tmp_path / "log")
    command.wait()
    return command


def check_stopped(tmp_path: Path, command: Command, what: str, *, steps: int = 2) -> None:
    directory = tmp_path / "run"
    assert command.process.returncode == 2, command.output
    assert "Traceback" not in command.output
    [line] = [line for line in command.output.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: step {steps}: ")
    assert what in line
    assert str(directory / "checkpoints" / f"step_{steps - 1}") in line
    assert checkpoints(directory) == [f"step_{step}" for step in range(1, steps)]
    assert [step["step"] for step in read_steps(directory)] == list(range(1, steps + 1))
    assert f"After step {steps} weights are not finite." in (directory / "report.html").read_text()
    assert not (directory / "summary.json").exists()
    assert not (directory / "hf").exists()


@pytest.mark.parametrize("job", ["sft", "dpo", "rm"])
def test_examples(tmp_path: Path, model: Path, job: str) -> None:
    command = poisoned(tmp_path, model, job, SFT if job == "sft" else PAIRS)
    check_stopped(tmp_path, command, "weights are not finite")
    assert read_steps(tmp_path / "run")[1]["non_finite_weights"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "sections", "what"),
    [
        ("grpo", {}, "weights are not finite"),
        ("distill", {"teacher": {}}, "weights are not finite"),
        ("ppo", {}, "weights are not finite"),
        (
            "ppo",
            {"optimizer": {"lr": 1e-4}, "critic": {"optimizer": POISON}},
            "critic weights are not finite",
        ),
    ],
)
def test_samples(tmp_path: Path, model: Path, job: str, sections: dict[str, Any], what: str) -> None:
    if "teacher" in sections:
        sections = {"teacher": {"path": str(model)}}
    command = poisoned(tmp_path, model, job, ONLINE, **sections)
    check_stopped(tmp_path, command, what)


def test_a_save_in_the_background_is_finished_first(tmp_path: Path, model: Path) -> None:
    command = poisoned(tmp_path, model, "sft", SFT, checkpoint=EVERY_STEP | {"async_save": True})
    check_stopped(tmp_path, command, "weights are not finite")


@pytest.mark.slow
def test_all_ranks_end_and_one_says_it(tmp_path: Path, model: Path) -> None:
    """Of two stages only the second has the loss; a tensor of the first alone is bad."""
    command = poisoned(
        tmp_path,
        model,
        "sft",
        SFT,
        parallel={"num_processes": 2, "pipeline_parallel_size": 2},
    )
    check_stopped(tmp_path, command, "weights are not finite")


def test_warn_goes_on_but_saves_and_exports_nothing_of_it(tmp_path: Path, model: Path) -> None:
    command = poisoned(tmp_path, model, "sft", SFT, optimizer=POISON)  # a reference: the stop
    assert command.process.returncode == 2
    config = tmp_path / "config.yaml"
    again = Command("sft", "--config", config, "run.on_non_finite=warn", output=tmp_path / "warned")
    assert again.wait() == 2  # it ended without a result
    assert checkpoints(tmp_path / "run") == ["step_1"]
    steps = read_steps(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(math.isnan(float(step["loss"])) for step in steps[2:])
    assert "WARNING: step 2: weights are not finite" in again.output
    assert "WARNING: step 3: loss is nan" in again.output
    assert "WARNING: step 3 is not saved: it was not finite" in again.output
    assert not (tmp_path / "run" / "hf").exists()


def test_a_model_with_one_bad_weight_is_named(tmp_path: Path, model: Path) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    command = poisoned(tmp_path, damaged, "sft", SFT, optimizer={"lr": 1e-3})
    assert command.process.returncode == 2
    [line] = [line for line in command.output.splitlines() if line.startswith("error")]
    assert "tensor model.layers.1.mlp.down_proj.weight has the value nan" in line
    assert checkpoints(tmp_path / "run") == []
