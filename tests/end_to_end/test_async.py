"""Asynchronous rollouts: versions, staleness, and resuming a killed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.data.order import PromptOrder
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, Command, read_lines, read_steps, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS, PROMPTS = 6, GRPO["rollout"]["num_prompts_per_step"]
# Long responses, so that weights change in the middle of them.
ASYNC: dict[str, dict[str, Any]] = {
    "rollout": {"max_staleness": 2, "max_new_tokens": 32},
    "algorithm": {"off_policy_correction": "tis", "off_policy_high": 2.0},
    "evaluation": {"at_start": False, "at_end": False},
    "training": {"num_steps": STEPS},
    "logging": {"samples_per_step": 100},
}


def prompts_of(directory: Path, step: int) -> list[int]:
    rows = read_lines(directory / "samples" / f"step_{step}.jsonl")
    return list(dict.fromkeys(row["prompt_index"] for row in rows))


def check(directory: Path) -> None:
    """Check the order of prompts, none lost and none twice; no sample too old; engine and trainer agree."""
    order = PromptOrder(GRPO["data"]["train"]["size"], shuffle=True, seed=1)
    steps = read_steps(directory)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        number = step["step"]
        assert prompts_of(directory, number) == order.batch((number - 1) * PROMPTS, PROMPTS)
        assert step["staleness_max"] <= 2
        assert step["logprob_abs_diff_max"] < 1e-3, "on tokens that the present weights drew"
        for row in read_lines(directory / "samples" / f"step_{number}.jsonl"):
            assert number - 3 <= row["policy_version"] <= number - 1
            spans = row.get("version_spans", [])
            assert not spans or sum(count for _, count in spans) == row["num_response_tokens"]
            assert [version for version, _ in spans] == sorted({version for version, _ in spans})
    stale = [step for step in steps if step["stale_tokens_fraction"] > 0]
    assert stale, "nothing was sampled ahead"
    assert all(step["stale_kl_rollout_trainer"] >= 0 for step in stale)
    assert all("corrected_fraction" in step for step in steps)


def test_samples_of_older_weights(tmp_path: Path, sft_run: FinishedRun) -> None:
    directory = tmp_path / "run"
    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=directory, model=sft_run.dir / "hf", **ASYNC)
    output = run("grpo", "--config", config, output=tmp_path / "log")
    assert "rollouts run up to 2 step(s) ahead" in output
    check(directory)


def test_a_killed_run_goes_on_with_the_same_prompts(tmp_path: Path, sft_run: FinishedRun) -> None:
    directory = tmp_path / "run"
    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=directory, model=sft_run.dir / "hf", **ASYNC)
    command = Command("grpo", "--config", config, output=tmp_path / "killed.log")
    try:
        command.wait_until(lambda: (directory / "checkpoints" / "step_3").is_dir())
    finally:
        command.kill()
    output = run("grpo", "--config", config, output=tmp_path / "resumed.log")
    assert "are sampled again, from the same prompts" in output
    check(directory)


def test_without_staleness_the_run_is_the_synchronous_one(
    tmp_path: Path, sft_run: FinishedRun, grpo_run: FinishedRun
) -> None:
    """k = 0 is bit for bit synchronous; so is the first step of an asynchronous run, without staleness."""
    first = json.loads((grpo_run.dir / "samples" / "step_1.jsonl").read_text().splitlines()[0])
    for staleness, steps in ((0, 4), (1, 1)):
        directory = tmp_path / str(staleness)
        config = write_config(
            tmp_path / f"{staleness}.yaml",
            GRPO,
            run_dir=directory,
            model=sft_run.dir / "hf",
            rollout={"max_staleness": staleness},
            training={"num_steps": steps},
        )
        run("grpo", "--config", config, output=tmp_path / f"{staleness}.log")
        for step in range(1, steps + 1):
            name = f"samples/step_{step}.jsonl"
            assert (directory / name).read_text() == (grpo_run.dir / name).read_text()
        for ours, theirs in zip(read_steps(directory), read_steps(grpo_run.dir), strict=False):
            for name in ("loss", "grad_norm", "reward_mean", "logprob_abs_diff_max", "entropy"):
                assert ours[name] == theirs[name], (ours["step"], name)
    assert first["policy_version"] == 0
