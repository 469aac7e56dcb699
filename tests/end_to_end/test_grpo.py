"""`megarl grpo` with a real vLLM engine: every metric against an independent computation."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import (
    GRPO,
    TASK,
    column,
    read_lines,
    read_steps,
    read_summary,
    run,
    write_config,
)

# Generous: process starts take ten times as long on a machine that does other things as well.
pytestmark = pytest.mark.timeout(1800)

STEPS = GRPO["training"]["num_steps"]
PROMPTS = GRPO["rollout"]["num_prompts_per_step"]
GENERATIONS = GRPO["rollout"]["num_generations_per_prompt"]
SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "grpo_steps",
    "wall_seconds",
    "phase_seconds",
    "tokens_per_second",
    "weights_bytes_moved",
    "logprob_abs_diff_max",
}


def read_samples(directory: Path, step: int) -> list[dict[str, Any]]:
    return read_lines(directory / "samples" / f"step_{step}.jsonl")


def expected_advantages(rewards: list[float], *, leave_one_out: bool) -> list[float]:
    """Return a group's advantages from the definition: divisor G - 1, 0 if all rewards are equal."""
    count, mean = len(rewards), sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / (count - 1)) ** 0.5
    if deviation == 0:
        return [0.0] * count
    baselines = [(sum(rewards) - r) / (count - 1) if leave_one_out else mean for r in rewards]
    return [(r - b) / (deviation + 1e-6) for r, b in zip(rewards, baselines, strict=True)]


def check_samples(directory: Path, step: int, *, leave_one_out: bool) -> list[dict[str, Any]]:
    """Check rewards with reasoning-gym and advantages from them; return the samples."""
    samples = read_samples(directory, step)
    assert len(samples) == PROMPTS * GENERATIONS
    source = GRPO["data"]["train"]
    dataset = reasoning_gym.create_dataset(
        TASK["task"], size=source["size"], seed=source["seed"], **TASK["arguments"]
    )
    for start in range(0, len(samples), GENERATIONS):
        group = samples[start : start + GENERATIONS]
        entry = dataset[group[0]["prompt_index"]]
        for sample in group:
            assert sample["prompt"] == entry["question"]
            assert sample["policy_version"] == step - 1
            assert sample["reward"] == dataset.score_answer(sample["response"].strip(), entry)
            assert sample["num_response_tokens"] == len(sample["rollout_logprobs"])
        rewards = [sample["reward"] for sample in group]
        advantages = [sample["advantage"] for sample in group]
        assert advantages == pytest.approx(expected_advantages(rewards, leave_one_out=leave_one_out))
    return samples


def test_engine_and_trainer_are_one_policy(grpo_run: FinishedRun) -> None:
    steps = read_steps(grpo_run.dir)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert step["policy_version"] == step["step"]
        assert step["weights_bytes_moved"] == 0
        assert 0 < step["logprob_abs_diff_max"] < 1e-3
        # one optimizer step per batch: the old logprobs are the current ones
        assert step["ratio_mean"] == 1
        assert step["ratio_max"] == 1
        assert step["kl_policy"] == 0
        assert step["clip_fraction"] == 0
        # All samples are in the file, with what the trainer computed for those that it did not skip.
        computed = [s for s in read_samples(grpo_run.dir, step["step"]) if "trainer_logprobs" in s]
        differences = [
            abs(trainer - engine)
            for sample in computed
            for trainer, engine in zip(sample["trainer_logprobs"], sample["rollout_logprobs"], strict=True)
        ]
        assert max(differences) == pytest.approx(step["logprob_abs_diff_max"], abs=2e-7)
        entropies = [value for sample in computed for value in sample["entropy"]]
        assert statistics.fmean(entropies) == pytest.approx(step["entropy"], rel=1e-4)
    # the weights did change, so the agreement above is that of the new ones
    assert any(step["grad_norm"] > 0 for step in steps[:-1])


def test_rewards_advantages_and_loss_follow_from_the_samples(grpo_run: FinishedRun) -> None:
    mixed = 0
    for step in read_steps(grpo_run.dir):
        samples = check_samples(grpo_run.dir, step["step"], leave_one_out=False)
        rewards = [sample["reward"] for sample in samples]
        lengths = [sample["num_response_tokens"] for sample in samples]
        assert step["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert step["response_length_mean"] == pytest.approx(sum(lengths) / len(lengths))
        # where all ratios are 1 the loss is minus the token mean of the advantages
        weighted = sum(s["advantage"] * s["num_response_tokens"] for s in samples)
        assert step["policy_loss"] == pytest.approx(-weighted / sum(lengths), abs=1e-5)
        mixed += step["grad_norm"] > 0
    assert mixed, "no group had different rewards: the run shows nothing"


def test_answers_of_evaluations_are_saved(grpo_run: FinishedRun) -> None:
    """Before the first step and after the last: the accuracy follows from them."""
    folder, count = grpo_run.dir / "evaluations", GRPO["evaluation"]["num_prompts"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_0.jsonl", f"step_{STEPS}.jsonl"]
    source = GRPO["data"]["held_out"]
    dataset = reasoning_gym.create_dataset(
        TASK["task"], size=source["size"], seed=source["seed"], **TASK["arguments"]
    )
    summary = read_summary(grpo_run.dir)
    for step, accuracy in ((0, summary["accuracy_before"]), (STEPS, summary["accuracy_after"])):
        answers = read_lines(folder / f"step_{step}.jsonl")
        assert len({answer["prompt_index"] for answer in answers}) == len(answers) == count
        scores = [dataset.score_answer(a["response"].strip(), dataset[a["prompt_index"]]) for a in answers]
        assert [answer["reward"] for answer in answers] == scores
        assert [answer["correct"] for answer in answers] == [score == 1 for score in scores]
        assert accuracy == sum(score == 1 for score in scores) / count


def test_summary_report_and_console(grpo_run: FinishedRun) -> None:
    summary = read_summary(grpo_run.dir)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["grpo_steps"] == STEPS
    assert summary["weights_bytes_moved"] == 0
    assert summary["logprob_abs_diff_max"] == max(column(grpo_run.dir, "logprob_abs_diff_max"))
    for accuracy in (summary["accuracy_before"], summary["accuracy_after"]):
        assert accuracy * GRPO["evaluation"]["num_prompts"] == int(accuracy * 8)
    assert sum(summary["phase_seconds"].values()) == pytest.approx(summary["wall_seconds"], rel=0.02)
    tokens = sum(
        sample["num_response_tokens"]
        for step in range(1, STEPS + 1)
        for sample in read_samples(grpo_run.dir, step)
    )
    speed = summary["tokens_per_second"]["rollout"]
    assert speed * summary["phase_seconds"]["rollout"] == pytest.approx(tokens)
    page = (grpo_run.dir / "report.html").read_text()
    assert set(re.findall(r"https?://[\w./-]+", page)) <= {"http://www.w3.org/2000/svg"}  # a name, not a link
    log = (grpo_run.dir / "console.log").read_text()
    assert "old logprobs: pass skipped" in log
    assert "reference logprobs: pass skipped" in log
    assert max(column(grpo_run.dir, "seconds_logprobs")) < 1e-3  # nothing but the clock itself


@pytest.mark.slow
def test_reference_and_several_optimizer_steps(tmp_path: Path, sft_run: FinishedRun) -> None:
    directory = tmp_path / "run"
    algorithm = {
        "kl_coef": 0.1,
        "num_optimizer_steps_per_batch": 2,
        "num_epochs_per_batch": 1,
        "baseline": "leave_one_out",
        "loss_aggregation": "sequence",
    }
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        algorithm=algorithm,
        evaluation={"at_start": False, "at_end": False},
    )
    output = run("grpo", "--config", config, "--verbose", output=tmp_path / "log")
    assert "old logprobs: one forward pass per rollout batch" in output
    assert "reference logprobs: one forward pass per batch" in output
    steps = read_steps(directory)
    assert len(steps) == STEPS
    for step in steps:
        check_samples(directory, step["step"], leave_one_out=True)
        assert step["seconds_logprobs"] > 0
        assert step["weights_bytes_moved"] == 0
        assert step["logprob_abs_diff_max"] < 1e-3
        # the means of both optimizer steps, of which only the second has ratios other than 1
        assert step["ratio_mean"] == pytest.approx(1, abs=0.2)
        assert step["kl_ref"] >= 0
    assert any(step["kl_policy"] > 0 for step in steps)
    assert steps[0]["kl_ref"] < 0.05  # the first of its two steps was taken at the reference itself
    assert steps[-1]["kl_ref"] > 0
    summary = read_summary(directory)
    assert summary["accuracy_before"] is None


@pytest.mark.slow
def test_top_p_and_top_k(tmp_path: Path, sft_run: FinishedRun) -> None:
    """The engine's logprobs after top-k and top-p are the trainer's over the same support."""
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        rollout={"top_p": 0.9, "top_k": 12, "temperature": 1.3, "num_generations_per_prompt": 16},
        algorithm={"entropy_coef": 0.01, "off_policy_correction": "tis", "off_policy_high": 2.0},
        evaluation={"at_start": False, "at_end": False},
        debug={"check_numerics": True},
    )
    run("grpo", "--config", config, output=tmp_path / "log")
    steps = read_steps(directory)
    assert len(steps) == STEPS
    for step in steps:
        assert 0 < step["logprob_abs_diff_max"] < 1e-3
        assert step["ratio_mean"] == step["ratio_max"] == 1
        assert step["corrected_fraction"] == 0
        assert step["correction_weight_mean"] == pytest.approx(1, abs=1e-3)
        assert step["loss"] == pytest.approx(step["policy_loss"] - 0.01 * step["entropy"], rel=1e-6)
        assert 0 < step["entropy"] < math.log(12)  # of the twelve tokens at most that could be drawn
    assert sum(column(directory, "num_tokens")) > 2000
    # the cut is felt: a token that is alone in its support is certain
    certain = [v == 0 for s in read_samples(directory, 1) for v in s["rollout_logprobs"]]
    assert 0 < sum(certain) < len(certain)


@pytest.mark.slow
def test_eval_and_report_of_a_finished_run(tmp_path: Path, grpo_run: FinishedRun) -> None:
    """`megarl eval` of the exported weights finds the accuracy that the run's own engine found."""
    base = {
        "data": {"held_out": GRPO["data"]["held_out"], "train": GRPO["data"]["train"]}
        | {"format": GRPO["data"]["format"]},
        "rollout": {key: GRPO["rollout"][key] for key in ("max_new_tokens", "engine")},
        "evaluation": {"num_prompts": 8},
    }
    directory = tmp_path / "eval"
    config = write_config(tmp_path / "eval.yaml", base, run_dir=directory, model=grpo_run.dir / "hf")
    run("eval", "--config", config, output=tmp_path / "eval.log")
    summary = read_summary(directory)
    assert summary["accuracy"] == read_summary(grpo_run.dir)["accuracy_after"]
    samples = read_samples(directory, 0)
    assert len(samples) == summary["num_prompts"] == 8
    assert sum(sample["reward"] == 1 for sample in samples) / 8 == summary["accuracy"]

    (grpo_run.dir / "report.html").unlink()
    output = run("report", grpo_run.dir, output=tmp_path / "report.log")
    assert output.strip().endswith("report.html")
    assert "reward_mean" in (grpo_run.dir / "report.html").read_text()
