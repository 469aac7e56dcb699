"""`megarl compare`: intervals against closed forms, and whole comparisons of run directories made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from megarl.cli import main
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config, public
from megarl.metrics.compare import block_interval, over_problems, over_steps, problem_scores
from megarl.run_directory import RunDirectory

SETTINGS = [
    "model.path=model",
    "optimizer.lr=1e-5",
    "data.train={source: reasoning_gym, task: chain_sum, size: 100}",
    "rollout={num_prompts_per_step: 8, num_generations_per_prompt: 4, max_new_tokens: 16}",
    "evaluation={at_start: false, at_end: false}",
    "training.num_steps=100",
]


def test_the_interval_of_independent_steps_is_the_normal_one() -> None:
    values = numpy.random.default_rng(3).normal(0.5, 2.0, 2500)
    low, high = block_interval(values)
    half = 1.96 * values.std() / 50
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    assert high - low == pytest.approx(2 * half, rel=0.2)


def test_steps_that_follow_one_another_make_it_wider() -> None:
    """AR(1) with coefficient 0.8: the mean deviates sqrt(1.8 / 0.2) = 3 times as far as independent ones."""
    draw = numpy.random.default_rng(4)
    noise, values = draw.normal(size=10_000), numpy.zeros(10_000)
    for step in range(1, len(values)):
        values[step] = 0.8 * values[step - 1] + noise[step]
    low, high = block_interval(values)
    alone = 2 * 1.96 * values.std() / 100
    assert (high - low) / alone == pytest.approx(3, rel=0.15)


def test_too_few_have_none() -> None:
    assert block_interval(numpy.array([1.0, 2.0, 3.0])) is None
    assert over_steps({1: 1.0, 2: 5.0}, {2: 7.0, 3: 1.0}).mean == 2.0
    assert over_steps({1: 1.0}, {2: 1.0}) is None


def answers(path: Path, rows: list[tuple[str, str, int, bool]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("prompt", "answer", "prompt_index", "correct")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_problems_are_paired_by_their_text(tmp_path: Path) -> None:
    """In another order, with another index, and with a problem that is there twice."""
    first = problem_scores(
        answers(
            tmp_path / "a.jsonl",
            [("1+1", "2", 0, True), ("1+1", "2", 0, False), ("2+2", "4", 1, False), ("1+1", "2", 2, True)],
        )
    )
    assert first == {("1+1", "2", 0): 0.5, ("2+2", "4", 0): 0.0, ("1+1", "2", 1): 1.0}
    other = problem_scores(
        answers(tmp_path / "b.jsonl", [("2+2", "4", 7, True), ("9+9", "18", 8, True), ("1+1", "2", 9, False)])
    )
    found = over_problems(first, other)
    assert (found.count, found.better, found.worse) == (2, 1, 1)
    assert found.mean == pytest.approx((1.0 - 0.5) / 2)


def make_run(path: Path, shift: float, *settings: str, seed: int) -> Path:
    """A run of 100 steps whose rewards are common noise plus ``shift``, and an evaluation of 200 problems."""
    config = load_config(GrpoConfig, None, [*SETTINGS, f"run.dir={path}", *settings], check_files=False)
    directory = RunDirectory(path)
    directory.open(public(config))
    directory.close()
    common, own = numpy.random.default_rng(1), numpy.random.default_rng(seed)
    rewards = common.normal(0.5, 0.3, 100) + own.normal(shift, 0.05, 100)
    lines = [{"step": step + 1, "reward_mean": value, "loss": 0.0} for step, value in enumerate(rewards)]
    directory.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hard = common.random(200)
    rows = [(f"problem {i}", str(i), i, bool(hard[i] < 0.5 + shift)) for i in range(200)]
    answers(directory.evaluations_path / "step_100.jsonl", rows)
    return path


def test_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "runs" / "a", 0.0, seed=5)
    other = make_run(tmp_path / "runs" / "b", 0.1, "optimizer.lr=3e-5", "algorithm.kl_coef=0.1", seed=6)
    assert main(["compare", str(first), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["configuration"] == {"optimizer.lr": [1e-5, 3e-5], "algorithm.kl_coef": [0.0, 0.1]}
    [pair] = found["paired"]
    reward = pair["steps"]["reward_mean"]
    assert reward["count"] == 100
    # Pairing takes the common noise out: the interval is that of noise of deviation 0.07, not 0.42.
    low, high = reward["interval"]
    assert low < 0.1 < high and high - low < 0.06
    assert pair["steps"]["loss"]["mean"] == 0.0
    problems = pair["problems"]
    assert problems["step"] == 100 and problems["count"] == 200 and problems["worse"] == 0
    assert problems["mean"] == pytest.approx(problems["better"] / 200)
    assert problems["interval"][0] > 0
    assert problems["accuracy"][1] - problems["accuracy"][0] == pytest.approx(problems["mean"])
    assert found["final"]["reward_mean"][0]["step"] == 100

    assert main(["compare", str(first), str(other)]) == 0
    text = capsys.readouterr().out
    assert "a: megarl grpo" in text and "b - a: mean of paired differences, 95% interval" in text
    assert any(line.split() == ["optimizer.lr", "1e-05", "3e-05"] for line in text.splitlines())
    assert f"200 problems, {problems['better']} better, 0 worse" in text
    assert main(["compare", str(first), str(other), "--metric", "loss"]) == 0
    assert "reward_mean" not in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "a", 0.0, seed=5)
    for arguments, message in (
        ([str(first)], "at least two run directories"),
        ([str(first), str(tmp_path)], "not a run directory (no config.yaml in it)"),
        (
            [str(first), str(first), "--metric", "rewards"],
            "--metric: no run has rewards; there are loss, reward_mean",
        ),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    (first / "evaluations" / "step_100.jsonl").write_text('{"prompt": "x"}\n')
    assert main(["compare", str(first), str(first)]) == 2
    assert "step_100.jsonl, line 1: not an answer of an evaluation" in capsys.readouterr().err
