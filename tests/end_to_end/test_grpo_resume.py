"""GRPO after a kill, on two trainer ranks, and on problems from a file."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import reasoning_gym
from math_verify import parse, verify

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
    GRPO,
    TASK,
    Command,
    checkpoints,
    column,
    read_lines,
    read_steps,
    run,
    write_config,
)
from tests.processes import command_line

# Generous: process starts take ten times as long on a machine that does other things as well.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = GRPO["training"]["num_steps"]


def belongs_to(process: psutil.Process, pids: set[int], ray_dir: str) -> bool:
    """Whether a process was part of the run, by its id or by Ray's directory in its command line."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and (
            process.pid in pids or any(ray_dir in word for word in process.cmdline())
        )
    except psutil.Error:
        return False


def survivors(pids: set[int], ray_dir: str) -> list[psutil.Process]:
    """Processes of the run that are still there after at most 20 s."""
    deadline = time.monotonic() + 20
    while True:
        alive = [p for p in psutil.process_iter() if belongs_to(p, pids, ray_dir)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def test_a_killed_run_goes_on_and_leaves_no_process(
    tmp_path: Path, sft_run: FinishedRun, grpo_run: FinishedRun
) -> None:
    directory = tmp_path / "run"
    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=directory, model=sft_run.dir / "hf")
    killed = Command("grpo", "--config", config, output=tmp_path / "1.log")
    killed.freeze_when(lambda: "step_2" in checkpoints(directory))
    saved = checkpoints(directory)
    family = psutil.Process(killed.process.pid).children(recursive=True)
    names = [child.name() for child in family]
    assert any("raylet" in name for name in names)
    assert any("Engine" in name for name in names), names
    [folder] = {name for child in family for name in re.findall(r"megarl-ray-\w+/", command_line(child))}
    killed.kill()
    assert survivors({child.pid for child in family}, folder) == []
    assert "step_4" not in saved

    output = run("grpo", "--config", config, output=tmp_path / "2.log")
    assert "(step 2)" in output or "(step 3)" in output
    assert [step["step"] for step in read_steps(directory)] == list(range(1, STEPS + 1))
    for name in ("reward_mean", "policy_loss", "grad_norm", "logprob_abs_diff_mean"):
        assert column(directory, name) == pytest.approx(column(grpo_run.dir, name), abs=1e-6)
    for step in range(1, STEPS + 1):
        ours, theirs = (
            [sample["response"] for sample in read_lines(where / "samples" / f"step_{step}.jsonl")]
            for where in (directory, grpo_run.dir)
        )
        assert ours == theirs


def test_two_trainer_ranks_learn_the_same(
    tmp_path: Path, sft_run: FinishedRun, grpo_run: FinishedRun
) -> None:
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        parallel={"num_processes": 2},
        training={"num_steps": 2},
        evaluation={"at_start": False, "at_end": False},
    )
    run("grpo", "--config", config, output=tmp_path / "log")
    assert len(read_steps(directory)) == 2
    assert column(directory, "reward_mean") == column(grpo_run.dir, "reward_mean")[:2]
    for name, tolerance in (("policy_loss", 1e-5), ("grad_norm", 1e-4), ("entropy", 1e-4)):
        assert column(directory, name) == pytest.approx(column(grpo_run.dir, name)[:2], abs=tolerance)
    assert column(directory, "weights_bytes_moved") == [0, 0]
    assert max(column(directory, "logprob_abs_diff_max")) < 1e-3


def test_problems_from_a_file_and_the_math_verifier(tmp_path: Path, sft_run: FinishedRun) -> None:
    dataset = reasoning_gym.create_dataset(TASK["task"], size=16, seed=1000, **TASK["arguments"])
    problems = [{"prompt": entry["question"], "answer": entry["answer"]} for entry in dataset]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        data={"train": {"source": "jsonl", "path": str(tmp_path / "problems.jsonl")}, "held_out": None},
        rollout={"num_prompts_per_step": 8, "num_generations_per_prompt": 8},
        evaluation={"at_start": False, "at_end": False},
        training={"num_steps": 1},
        logging={"samples_per_step": 64},
    )
    run("grpo", "--config", config, output=tmp_path / "log")
    samples = read_lines(directory / "samples" / "step_1.jsonl")
    assert len(samples) == 64
    for sample in samples:
        answer = problems[sample["prompt_index"]]["answer"]
        assert sample["answer"] == answer
        expected = verify(parse(answer), parse(sample["response"], fallback_mode="no_fallback"))
        assert sample["reward"] == float(expected), sample["response"]
    assert 0 < sum(sample["reward"] for sample in samples) < 64
    [step] = read_steps(directory)
    assert step["reward_mean"] == sum(sample["reward"] for sample in samples) / 64
