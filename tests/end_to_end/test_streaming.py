"""Runs on streamed data: against the same data read whole, two processes, and interrupted ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import (
    GRPO,
    SFT,
    Command,
    column,
    read_lines,
    read_steps,
    read_summary,
    run,
    write_config,
)

# Generous: process starts take ten times as long on a machine that does other things as well.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

NUM_ROWS, STEPS = 60, 12  # of 8 rows: the second epoch begins in step 8
STREAM = {"streaming": True, "streaming_window": 16}
TRAINING = {"num_steps": STEPS, "batch_size": 8}


def source(path: Path, **fields: Any) -> dict[str, Any]:
    """A file of sums with a right and a wrong answer, for every job."""
    rows = [{"prompt": f"{n % 9} + {n % 7} =", "answer": n % 9 + n % 7} for n in range(NUM_ROWS)]
    texts = [
        json.dumps(row | {"response": str(row["answer"]), "chosen": str(row["answer"]), "rejected": "no"})
        + "\n"
        for row in rows
    ]
    path.write_text("".join(texts))
    return {"source": "jsonl", "path": str(path), **fields}


def test_sft(tmp_path: Path, model: Path) -> None:
    def config(name: str, stream: dict[str, Any], shuffle: bool, processes: int = 1) -> Path:
        train = source(tmp_path / "rows.jsonl", prompt_field="prompt", response_field="response", **stream)
        return write_config(
            tmp_path / f"{name}.yaml",
            SFT,
            run_dir=tmp_path / name,
            model=model,
            data={"train": train, "shuffle": shuffle},
            training=TRAINING,
            parallel={"num_processes": processes},
            checkpoint={"export_hf": False},
        )

    def losses(name: str, *arguments: Any) -> list[float]:
        run("sft", "--config", config(name, *arguments), output=tmp_path / f"{name}.log")
        return column(tmp_path / name, "loss")

    assert losses("streamed", STREAM, False) == losses("whole", {}, False)
    expected = losses("shuffled", STREAM, True)
    assert expected != column(tmp_path / "streamed", "loss")

    file = config("stopped", STREAM, True, 2)
    command = Command("sft", "--config", file, output=tmp_path / "1.log")
    command.wait_until(lambda: len(read_steps(tmp_path / "stopped")) >= 3)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 143, command.output
    stopped = len(read_steps(tmp_path / "stopped"))
    assert stopped < STEPS
    found = losses("stopped", STREAM, True)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)
    assert read_summary(tmp_path / "stopped")["validation_loss"] == pytest.approx(
        read_summary(tmp_path / "shuffled")["validation_loss"], rel=1e-5
    )

    command = Command("sft", "--config", file, "data.train.path=nowhere.jsonl", output=tmp_path / "2.log")
    assert command.wait() == 2
    assert "data.train.path: no such file" in command.output


def test_a_bad_row_ends_every_rank(tmp_path: Path, model: Path) -> None:
    """In the third window of a run on two processes; the run goes on with on_bad_row: skip."""
    train = source(tmp_path / "rows.jsonl", **STREAM)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join([*lines[:40], "{\n", *lines[40:]]))
    config = write_config(
        tmp_path / "sft.yaml",
        SFT,
        run_dir=tmp_path / "run",
        model=model,
        data={"train": train | {"row_format": "prompt_response"}},
        training=TRAINING,
        parallel={"num_processes": 2},
        checkpoint={"interval": 2, "export_hf": False},
    )
    command = Command("sft", "--config", config, output=tmp_path / "1.log")
    assert command.wait() == 2, command.output
    assert f"{tmp_path}/rows.jsonl:41: malformed JSON" in command.output
    assert len(read_steps(tmp_path / "run")) == 4  # two windows of 16 rows
    output = run("sft", "--config", config, "data.on_bad_row=skip", output=tmp_path / "2.log")
    assert "(step 4)" in output
    assert "data.train, rows 33 to 48: 1 bad of 16 rows skipped (data.on_bad_row)" in output
    assert len(read_steps(tmp_path / "run")) == STEPS


def test_dpo(tmp_path: Path, model: Path) -> None:
    """The reference logprobs of each step are those that are computed before the first one."""

    def losses(name: str, stream: dict[str, Any], *overrides: str) -> list[float]:
        base = {**SFT, "packing": {"max_tokens_per_microbatch": 64, "max_sequence_length": 32}}
        config = write_config(
            tmp_path / f"{name}.yaml",
            base,
            run_dir=tmp_path / name,
            model=model,
            data={"train": source(tmp_path / "rows.jsonl", **stream), "held_out": None, "shuffle": False},
            training=TRAINING | {"validation_size": 1},
            checkpoint={"interval": 4, "export_hf": False},
        )
        run("dpo", "--config", config, *overrides, output=tmp_path / f"{name}.log")
        return column(tmp_path / name, "loss")

    expected = losses("whole", {})
    assert expected[-1] < 0.8 * expected[0]
    assert losses("streamed", STREAM) == pytest.approx(expected, rel=1e-4)
    assert len(losses("stopped", STREAM, "training.num_steps=8")) == 8
    assert losses("stopped", STREAM) == column(tmp_path / "streamed", "loss")


def test_grpo(tmp_path: Path, model: Path) -> None:
    """The prompts of a stream, their numbers (which seed the samples), and a run that is resumed."""

    def samples(name: str, stream: dict[str, Any], *overrides: str) -> list[Any]:
        config = write_config(
            tmp_path / f"{name}.yaml",
            GRPO,
            run_dir=tmp_path / name,
            model=model,
            data={"train": source(tmp_path / "rows.jsonl", **stream), "shuffle": False},
            rollout={"engine": {**GRPO["rollout"]["engine"], "backend": "hf"}},
            evaluation={"at_start": False},
            checkpoint={"export_hf": False},
        )
        output = run("grpo", "--config", config, *overrides, output=tmp_path / f"{name}.log")
        assert ("were not checked against the training problems: they are streamed" in output) == bool(stream)
        files = [tmp_path / name / "samples" / f"step_{step}.jsonl" for step in range(1, 5)]
        rows = [row for file in files for row in read_lines(file)]
        return [(row["step"], row["prompt"], row["response_tokens"]) for row in rows]

    expected = samples("whole", {})
    assert len(expected) == 4 * 16
    stream = {"streaming": True, "streaming_window": 6}
    assert len(samples("streamed", stream, "training.num_steps=2")) == 2 * 16
    assert samples("streamed", stream) == expected
