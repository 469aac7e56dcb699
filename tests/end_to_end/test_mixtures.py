"""`megarl grpo` on weighted sources with their own verifiers, and on rising levels."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.arithmetic.chain_sum import ChainSumCurriculum

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, TASK, column, read_lines, read_steps, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUIET = {"at_start": False, "at_end": False}
GCD = {"source": "reasoning_gym", "task": "gcd"}


def train(
    directory: Path, sft_run: FinishedRun, source: dict[str, Any], steps: int, **sections: dict[str, Any]
) -> Path:
    config = write_config(
        directory / f"{steps}.yaml",
        GRPO,
        run_dir=directory / "run",
        model=sft_run.dir / "hf",
        data={"train": source, "held_out": None, "format": {"chat_template": False}},
        evaluation=QUIET,
        training={"num_steps": steps},
        packing={"max_tokens_per_microbatch": 512, "max_sequence_length": 256},
        logging={"samples_per_step": 16},
        **sections,
    )
    run("grpo", "--config", config, output=directory / f"{steps}.log")
    return directory / "run"


def prompts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Return one sample of each of the step's four groups."""
    return read_lines(run_dir / "samples" / f"step_{step}.jsonl")[::4]


def test_a_weighted_mixture(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Three quarters sums, a quarter greatest common divisors; rewards are the tasks' own."""
    sums = {**TASK, "size": 40, "seed": 1000}
    parts = {"gcd": {**GCD, "size": 10, "seed": 7}, "sums": sums}  # as the file has them: sorted
    source = {"source": "mixture", "weights": {"sums": 3, "gcd": 1}, "sources": parts}
    directory = train(tmp_path, sft_run, source, 4)
    datasets = [
        reasoning_gym.create_dataset(
            part["task"], size=part["size"], seed=part["seed"], **part.get("arguments", {})
        )
        for part in parts.values()
    ]
    drawn = []
    for step in range(1, 5):
        for sample in read_lines(directory / "samples" / f"step_{step}.jsonl"):
            kind = int(sample["prompt_index"] >= 10)
            index = sample["prompt_index"] - 10 * kind
            entry = datasets[kind][index]
            assert sample["prompt"] == entry["question"]
            assert sample["reward"] == datasets[kind].score_answer(sample["response"].strip(), entry)
        drawn += [sample["prompt_index"] for sample in prompts(directory, step)]
    # Shares are exact over a block of draws (tests/data/test_sources.py); these are its first 16.
    share = sum(index < 10 for index in drawn) / 16
    assert share > 0
    assert abs(share - 0.25) < 3 * (0.25 * 0.75 / 16) ** 0.5
    assert len(set(drawn)) == 16, "no problem comes twice before each has come once"


def test_a_curriculum_rises_and_outlives_an_interruption(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Every step's problems are reasoning-gym's of the level that the samples so far earned."""
    curriculum = {"raise_at": 0.05, "min_samples": 16, "max_level": 2}
    source = {"source": "reasoning_gym", "task": "chain_sum", "size": 64, "seed": 3, "curriculum": curriculum}
    source["arguments"] = {"allow_negation": False}
    for steps in (3, 6):  # the second goes on from the first one's checkpoint
        directory = train(tmp_path, sft_run, source, steps)
    levels, level, recent = ChainSumCurriculum(), 0, deque[bool](maxlen=16)
    for step in range(1, 7):
        levels.set_global_level(level)
        made = levels.generate_configuration({"allow_negation": False, "seed": 3, "size": 64})
        dataset = reasoning_gym.create_dataset("chain_sum", **vars(made))
        assert read_steps(directory)[step - 1]["level"] == level
        for sample in read_lines(directory / "samples" / f"step_{step}.jsonl"):
            assert sample["prompt"] == dataset[sample["prompt_index"]]["question"]
            recent.append(sample["reward"] == 1)
        if len(recent) == 16 and sum(recent) >= 0.05 * 16 and level < 2:
            level += 1
            recent.clear()
    assert column(directory, "level")[-1] > 0, "no level rose: the run shows nothing"
