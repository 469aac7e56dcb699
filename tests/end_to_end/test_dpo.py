"""`megarl dpo`: the files of a run, its reference cache, two processes against one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.config.metric_names import DPO as LOGGED
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
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

STEPS, BATCH, VALIDATION = 12, 8, 16
FORMS = [("{a}", "The answer is {b}."), ("{a}.", "{b}")]


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    """Sums of two numbers: the right answer, and a wrong one in another form."""
    rows = []
    for number in range(first, first + count):
        a, b = number % 9, (number * 7) % 11
        chosen, rejected = FORMS[number % 2]
        rows.append(
            {
                "prompt": f"{a} + {b} =",
                "chosen": chosen.format(a=a + b),
                "rejected": rejected.format(b=a + b + 1),
            }
        )
    return rows


HELD_OUT = pairs(1000, 24)
DPO: dict[str, Any] = {
    "data": {"format": {"chat_template": False}},
    "algorithm": {"beta": 0.3, "label_smoothing": 0.05, "sft_coef": 0.1},
    "training": {
        "num_steps": STEPS,
        "batch_size": BATCH,
        "validation_interval": 6,
        "validation_size": VALIDATION,
    },
    "optimizer": {"lr": 3e-3},
    "packing": {"max_tokens_per_microbatch": 64, "max_sequence_length": 32},
    "checkpoint": {"interval": 0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration with its data files written."""
    folder = tmp_path_factory.mktemp("dpo_data")
    for name, rows in (("train", pairs(0, 40)), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        name: {"source": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in ("train", "held_out")
    }
    return DPO | {"data": DPO["data"] | files}


@pytest.fixture(scope="module")
def dpo_run(workspace: Path, model: Path, base: dict[str, Any]) -> FinishedRun:
    """An uninterrupted run on one process."""
    directory = workspace / "dpo"
    config = write_config(workspace / "dpo.yaml", base, run_dir=directory, model=model)
    return FinishedRun(directory, config, run("dpo", "--config", config, output=workspace / "dpo.log"))


def response_logps(directory: Path, row: dict[str, Any], tokenizer: Any) -> list[float]:
    """Summed logprobs of chosen and rejected by transformers alone; their numbers of tokens follow."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sums, counts = [], []
    for name in ("chosen", "rejected"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row[name])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        sums.append(
            -torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        )
        counts.append(len(response))
    return sums + counts


def test_a_run_learns_and_leaves_its_files(dpo_run: FinishedRun) -> None:
    steps = read_lines(dpo_run.dir / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert set().union(*steps) - {"step"} <= LOGGED
    nll = -steps[0]["logps_chosen"]
    assert steps[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5), "the policy is the reference at first"
    assert steps[0]["loss"] == pytest.approx(math.log(2) + 0.1 * steps[0]["sft_loss"], abs=1e-5)
    assert steps[0]["sft_loss"] < nll
    assert steps[-1]["reward_accuracy"] > 0.9
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(line["num_microbatches"] > 1 for line in steps)
    for line in steps:
        assert line["reward_margin"] == pytest.approx(
            line["reward_chosen"] - line["reward_rejected"], abs=1e-6
        )
    summary = read_summary(dpo_run.dir)
    assert summary["dpo_steps"] == STEPS
    assert summary["loss"] == steps[-1]["loss"]
    assert summary["validation_accuracy"] == steps[-1]["validation_accuracy"]
    assert [line["step"] for line in steps if "validation_loss" in line] == [6, STEPS]
    assert summary["reference"]["read"] == 0
    assert f"0 sequences read, {summary['reference']['computed']} computed" in dpo_run.output
    assert (dpo_run.dir / "report.html").exists()


def test_transformers_agrees_on_the_held_out_pairs(dpo_run: FinishedRun, model: Path) -> None:
    """Loss and accuracy from the exported model and the one it began as, one response at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses, right, nll, tokens = [], 0, 0.0, 0
    for row in HELD_OUT[:VALIDATION]:
        chosen, rejected, count, _ = response_logps(dpo_run.dir / "hf", row, tokenizer)
        ref_chosen, ref_rejected, _, _ = response_logps(model, row, tokenizer)
        margin = 0.3 * (chosen - ref_chosen - rejected + ref_rejected)
        losses.append(0.95 * math.log1p(math.exp(-margin)) + 0.05 * math.log1p(math.exp(margin)))
        right += margin > 0
        nll, tokens = nll - chosen, tokens + count
    summary = read_summary(dpo_run.dir)
    expected = sum(losses) / VALIDATION + 0.1 * nll / tokens
    assert summary["validation_loss"] == pytest.approx(expected, abs=1e-4)
    assert summary["validation_accuracy"] == pytest.approx(right / VALIDATION)


def copy_cache(source: FinishedRun, target: Path) -> Path:
    """Take a run's reference logprobs along, and nothing else of it."""
    [file] = (source.dir / "reference").iterdir()
    target.mkdir(parents=True)
    return Path(shutil.copy(file, target / file.name))


@pytest.mark.slow
def test_the_cache_is_used_by_content_and_never_when_damaged(
    tmp_path: Path, model: Path, base: dict[str, Any], dpo_run: FinishedRun
) -> None:
    short = {"training": {"num_steps": 2}, "checkpoint": {"export_hf": False}}
    losses = column(dpo_run.dir, "loss")[:2]
    cache = tmp_path / "cache"
    file = copy_cache(dpo_run, cache)
    # A copy of the model elsewhere is the same model.
    shutil.copytree(model, tmp_path / "model")
    sections = short | {"reference": {"cache_dir": str(cache)}}
    config = write_config(
        tmp_path / "a.yaml", base, run_dir=tmp_path / "a", model=tmp_path / "model", **sections
    )
    output = run("dpo", "--config", config, output=tmp_path / "a.log")
    assert f"sequences read from {file}, 0 computed" in output
    assert column(tmp_path / "a", "loss") == losses

    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    config = write_config(tmp_path / "b.yaml", base, run_dir=tmp_path / "b", model=model, **sections)
    output = run("dpo", "--config", config, output=tmp_path / "b.log")
    assert f"{file} is not used, its checksum does not fit its content; it is written anew" in output
    assert "0 sequences read" in output
    # Fewer sequences, packed otherwise: the same up to rounding.
    assert column(tmp_path / "b", "loss") == pytest.approx(losses, abs=1e-5)
    # Resuming with another reference than the run began with is rejected, before any training.
    shutil.copy(dpo_run.dir / "hf" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    config = write_config(
        tmp_path / "a.yaml",
        base,
        run_dir=tmp_path / "a",
        model=tmp_path / "model",
        **sections | {"training": {"num_steps": 3}},
    )
    command = Command("dpo", "--config", config, output=tmp_path / "c.log")
    assert command.wait() == 2, command.output
    assert f"model.path: {tmp_path / 'model'} holds other weights than when this run began" in command.output


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, model: Path, base: dict[str, Any], dpo_run: FinishedRun
) -> None:
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "dpo.yaml", base, run_dir=directory, model=model, checkpoint={"interval": 2, "keep": 99}
    )
    first = Command("dpo", "--config", config, output=tmp_path / "1.log")
    first.freeze_when(lambda: "step_4" in checkpoints(directory) and len(read_steps(directory)) % 2)
    lines = len(read_steps(directory))
    first.kill()
    output = run("dpo", "--config", config, output=tmp_path / "2.log")
    assert f"(step {lines - 1})" in output
    assert "sequences read from" in output and ", 0 computed" in output
    for name in ("loss", "grad_norm", "reward_margin", "lr"):
        assert column(directory, name) == column(dpo_run.dir, name)
    ours, theirs = read_summary(directory), read_summary(dpo_run.dir)
    for name in ("validation_loss", "validation_accuracy"):
        assert ours[name] == theirs[name]


@pytest.mark.slow
def test_two_processes_learn_the_same(
    tmp_path: Path, model: Path, base: dict[str, Any], dpo_run: FinishedRun
) -> None:
    config = write_config(
        tmp_path / "dpo.yaml", base, run_dir=tmp_path / "run", model=model, parallel={"num_processes": 2}
    )
    run("dpo", "--config", config, output=tmp_path / "run.log")
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert column(tmp_path / "run", name) == pytest.approx(column(dpo_run.dir, name), abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "kto", "simpo", "orpo"])
def test_the_other_losses_learn_too(tmp_path: Path, model: Path, base: dict[str, Any], loss: str) -> None:
    config = write_config(
        tmp_path / "c.yaml", base | {"algorithm": {"loss": loss}}, run_dir=tmp_path / "run", model=model
    )
    run("dpo", "--config", config, output=tmp_path / "log")
    losses = column(tmp_path / "run", "loss")
    assert losses[-1] < losses[0]
    assert column(tmp_path / "run", "reward_accuracy")[-1] > 0.8
    needs_reference = loss in ("ipo", "kto")
    assert (tmp_path / "run" / "reference").exists() == needs_reference
    assert (read_summary(tmp_path / "run")["reference"] is not None) == needs_reference
