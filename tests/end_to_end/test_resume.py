"""Resuming: with more steps, from damaged checkpoints, and from weights saved alone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import SFT, Command, checkpoints, column, read_steps, run, write_config

pytestmark = pytest.mark.timeout(1800)

SAVED = {"interval": 1, "keep": 9, "export_hf": False}


def config_of(folder: Path, model: Path, **sections: Any) -> Path:
    sections = {"training": {"num_steps": 3, "batch_size": 8}, "checkpoint": SAVED} | sections
    return write_config(folder / "sft.yaml", SFT, run_dir=folder / "run", model=model, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("finished")
    run("sft", "--config", config_of(folder, model), output=folder / "log")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_more_steps_go_on_on_the_longer_schedule(tmp_path: Path, model: Path, shape: str) -> None:
    config = config_of(tmp_path, model, optimizer={"lr": 1e-3, "lr_schedule": shape, "min_lr": 1e-4})
    run("sft", "--config", config, output=tmp_path / "1.log")
    output = run("sft", "--config", config, "training.num_steps=6", output=tmp_path / "2.log")
    assert "training.num_steps (was 3, now 6)" in output

    def rate(step: int, length: int) -> float:
        """Of the optimizer step that is taken as number ``step`` (from 1)."""
        done = (step - 1) / length
        left = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return 1e-4 + 9e-4 * left

    expected = [rate(step, 3) for step in (1, 2, 3)] + [rate(step, 6) for step in (4, 5, 6)]
    assert column(tmp_path / "run", "lr") == pytest.approx(expected, rel=1e-6)


def test_two_flipped_bytes_are_found_and_the_run_goes_on_as_if_never_stopped(
    tmp_path: Path, finished: Path, model: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished / "run", directory)
    losses = column(directory, "loss")
    [data] = (directory / "checkpoints" / "step_3").glob("*.distcp")
    content = bytearray(data.read_bytes())
    for place in (len(content) // 3, len(content) // 2):
        content[place] ^= 1
    data.write_bytes(content)
    config = config_of(tmp_path, model)
    output = run("sft", "--config", config, "training.num_steps=4", output=tmp_path / "log")
    assert f"WARNING: checkpoint step_3 is damaged ({data.name} has changed" in output
    assert "going on from step_2" in output
    assert column(directory, "loss")[:3] == losses
    assert checkpoints(directory) == ["step_1", "step_2", "step_3", "step_3.damaged", "step_4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "rng_00000.pt", "__0_0.distcp"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense", None])
def test_a_damaged_checkpoint_of_before_checksums_is_a_line(
    tmp_path: Path, finished: Path, model: Path, name: str, content: bytes | None
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished / "run", directory)
    path = directory / "checkpoints" / "step_3"
    (path / "checksums.json").unlink()
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    config = config_of(tmp_path, model)
    command = Command("sft", "--config", config, "training.num_steps=4", output=tmp_path / "log")
    code = command.wait()
    assert "Traceback" not in command.output
    if (name, content) == ("rng_00000.pt", None):  # as if another number of ranks had written it
        assert code == 0
    else:
        assert code == 2
        [line] = [line for line in command.output.splitlines() if line.startswith("error")]
        assert str(path) in line


@pytest.mark.slow
def test_weights_alone_are_no_run_to_go_on_from(tmp_path: Path, model: Path) -> None:
    weights = {"interval": 0, "save_optimizer": False, "export_hf": True}
    config = config_of(tmp_path, model, checkpoint=weights)
    run("sft", "--config", config, output=tmp_path / "1.log")
    exported = tmp_path / "run" / "hf" / "model.safetensors"
    first = exported.read_bytes()
    shutil.rmtree(exported.parent)
    run("sft", "--config", config, output=tmp_path / "2.log")  # nothing is left to do but the export
    assert exported.read_bytes() == first
    command = Command("sft", "--config", config, "training.num_steps=5", output=tmp_path / "3.log")
    assert command.wait() == 2
    [line] = [line for line in command.output.splitlines() if line.startswith("error")]
    assert "was saved without its optimizer (checkpoint.save_optimizer: false)" in line
    assert len(read_steps(tmp_path / "run")) == 3


@pytest.mark.slow
def test_data_that_has_changed_is_said_or_refused(tmp_path: Path, model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "response": "2"}\n' * 16)
    data = {"train": {"source": "jsonl", "path": str(rows)}, "format": {"chat_template": False}}
    config = config_of(tmp_path, model, data=data, training={"num_steps": 1, "batch_size": 8})
    first = run("sft", "--config", config, output=tmp_path / "1.log")
    again = run("sft", "--config", config, "training.num_steps=2", output=tmp_path / "2.log")
    assert "WARNING" not in first + again
    rows.write_text('{"prompt": "1 + 1 =", "response": "3"}\n' * 16)
    refusing = Command(
        *("sft", "--config", config, "training.num_steps=3", "run.on_changed_inputs=refuse"),
        output=tmp_path / "3.log",
    )
    assert refusing.wait() == 2
    assert "data.train.path: rows.jsonl has changed since this run began" in refusing.output
    assert len(read_steps(tmp_path / "run")) == 2
    warned = run("sft", "--config", config, "training.num_steps=3", output=tmp_path / "4.log")
    assert "WARNING: data.train.path: rows.jsonl has changed since this run began" in warned
    assert "WARNING" not in run("sft", "--config", config, "training.num_steps=4", output=tmp_path / "5.log")
