"""`megarl sft`: the files of a run, resuming after a kill, and two processes against one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import torch
import transformers
import yaml

from megarl.config.load import load_config
from megarl.config.metric_names import SFT as LOGGED
from megarl.config.sft import SftConfig
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
    SFT,
    TASK,
    Command,
    checkpoints,
    column,
    read_lines,
    read_steps,
    read_summary,
    run,
    write_config,
)

# Generous: process starts take ten times as long on a machine that does other things as well.
pytestmark = pytest.mark.timeout(1800)

STEPS = SFT["training"]["num_steps"]


def hf_validation_loss(directory: Path) -> float:
    """Mean loss per response token of the held-out problems, by transformers, one at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return validation_loss_of(model, directory)


def validation_loss_of(model: Any, directory: Path) -> float:
    """The same of a model that is loaded already; the tokenizer lies in ``directory``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    source = SFT["data"]["held_out"]
    problems = reasoning_gym.create_dataset(
        TASK["task"], size=source["size"], seed=source["seed"], **TASK["arguments"]
    )
    total, count = 0.0, 0
    for problem in problems:
        prompt = tokenizer(problem["question"])["input_ids"]
        response = [*tokenizer(problem["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    return total / count


def test_a_run_learns_and_leaves_its_files(sft_run: FinishedRun) -> None:
    steps = read_lines(sft_run.dir / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert set().union(*steps) - {"step"} <= LOGGED
    losses = [line["loss"] for line in steps]
    assert losses[0] > 4  # 512 tokens, untrained: about log(512) = 6.2
    assert losses[-1] < 0.5 * losses[0]
    assert all(line["num_microbatches"] > 1 for line in steps)  # the loss is a mean over several
    summary = read_summary(sft_run.dir)
    assert summary["sft_steps"] == STEPS
    assert summary["loss"] == losses[-1]
    assert summary["wall_seconds"] == pytest.approx(sum(line["seconds"] for line in steps))
    assert summary["validation_loss"] == steps[-1]["validation_loss"]
    assert (sft_run.dir / "report.html").exists()
    assert checkpoints(sft_run.dir) == [f"step_{STEPS}"]


def test_every_step_has_its_timeline_and_its_memory(sft_run: FinishedRun) -> None:
    lines = read_lines(sft_run.dir / "timeline" / "rank_00000.jsonl")
    steps = read_lines(sft_run.dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [step["step"] for step in steps]
    spans = [span for line in lines for span in line["spans"]]
    train = sum(end - begin for depth, name, begin, end in spans if (depth, name) == (0, "train"))
    # A busy machine may halt the process between the two clocks of a step.
    assert train == pytest.approx(sum(step["seconds_train"] for step in steps), rel=0.2)
    total = sum(step["seconds"] for step in steps)
    assert sum(line["seconds"] for line in lines) == pytest.approx(total, rel=0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(sft_run.dir / "hf")
    size = 4 * model.num_parameters()
    for name, factor in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert factor * size <= steps[-1][f"memory_{name}_gib"] * 2**30 <= 1.03 * factor * size


def test_transformers_agrees_on_the_exported_model(sft_run: FinishedRun) -> None:
    expected = hf_validation_loss(sft_run.dir / "hf")
    assert read_summary(sft_run.dir)["validation_loss"] == pytest.approx(expected, abs=1e-4)


def test_the_resolved_configuration_is_a_configuration(sft_run: FinishedRun) -> None:
    resolved = load_config(SftConfig, sft_run.dir / "config.yaml", [])
    assert resolved == load_config(SftConfig, sft_run.config, [])
    assert resolved.model_dump(mode="json") == yaml.safe_load((sft_run.dir / "config.yaml").read_text())


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, model: Path, sft_run: FinishedRun
) -> None:
    """Killed between checkpoints, then while one is being written; the third start ends the run."""
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "sft.yaml", SFT, run_dir=directory, model=model, checkpoint={"interval": 4, "keep": 99}
    )
    first = Command("sft", "--config", config, output=tmp_path / "1.log")
    first.freeze_when(lambda: "step_8" in checkpoints(directory) and len(read_steps(directory)) % 4)
    lines, saved = len(read_steps(directory)), latest(directory)
    first.kill()
    assert lines > saved  # there are metrics to forget

    second = Command("sft", "--config", config, output=tmp_path / "2.log")
    second.freeze_when(lambda: saved + 4 <= latest(directory) and partial(directory))
    saved_later, unfinished = latest(directory), partial(directory)
    second.kill()
    assert f"(step {saved})" in second.output
    assert unfinished == [f".step_{saved_later + 4}.partial"]

    output = run("sft", "--config", config, output=tmp_path / "3.log")
    assert f"(step {saved_later})" in output
    assert partial(directory) == []
    assert [line["step"] for line in read_lines(directory / "metrics.jsonl")] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr"):
        assert column(directory, name) == column(sft_run.dir, name)
    assert read_summary(directory)["validation_loss"] == read_summary(sft_run.dir)["validation_loss"]


@pytest.mark.slow
def test_sigterm_saves_the_step_it_stops_at(tmp_path: Path, model: Path, sft_run: FinishedRun) -> None:
    directory = tmp_path / "run"
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=directory, model=model)
    command = Command("sft", "--config", config, output=tmp_path / "1.log")
    command.wait_until(lambda: len(read_steps(directory)) >= 5)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 143, command.output
    stopped = read_steps(directory)[-1]["step"]
    assert 5 <= stopped < STEPS
    assert checkpoints(directory) == [f"step_{stopped}"]
    state = json.loads((directory / "checkpoints" / f"step_{stopped}" / "run_state.json").read_text())
    assert state["step"] == stopped
    assert not (directory / "summary.json").exists()

    output = run("sft", "--config", config, output=tmp_path / "2.log")
    assert f"(step {stopped})" in output
    assert column(directory, "loss") == column(sft_run.dir, "loss")


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path, model: Path, sft_run: FinishedRun) -> None:
    config = write_config(
        tmp_path / "sft.yaml",
        SFT,
        run_dir=tmp_path / "run",
        model=model,
        parallel={"num_processes": 2},
        training={"num_steps": 12},
    )
    run("sft", "--config", config, output=tmp_path / "run.log")
    assert len(read_steps(tmp_path / "run")) == 12
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        ours, alone = column(tmp_path / "run", name), column(sft_run.dir, name)[:12]
        assert ours == pytest.approx(alone, abs=tolerance)
    assert read_summary(tmp_path / "run")["validation_loss"] == pytest.approx(
        hf_validation_loss(tmp_path / "run" / "hf"), abs=1e-4
    )


def latest(directory: Path) -> int:
    """Step of the newest complete checkpoint, 0 where there is none."""
    names = [name for name in checkpoints(directory) if not name.startswith(".")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def partial(directory: Path) -> list[str]:
    """Checkpoints that are being written."""
    return [name for name in checkpoints(directory) if name.endswith(".partial")]
