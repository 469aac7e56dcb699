"""`megarl eval` of a run's Megatron checkpoint, its Hugging Face export and a converted checkpoint."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, TASK, read_lines, read_summary, run, write_config

BASE: dict[str, Any] = {
    "data": {
        "held_out": {**TASK, "size": 64, "seed": 100_000},
        "format": {"chat_template": False},
    },
    "rollout": {"max_new_tokens": 6, "engine": GRPO["rollout"]["engine"]},
}


@pytest.mark.slow
def test_checkpoints_and_their_export_give_the_same_answers(tmp_path: Path, sft_run: FinishedRun) -> None:
    """Greedy, 5 problems: the run's own checkpoint, converted there and back, against the export.

    And the export with the other engine.
    """
    answers = {}
    converted = tmp_path / "megatron"
    run("convert", "hf-to-megatron", sft_run.dir / "hf", converted, output=tmp_path / "convert.log")
    models = {
        "hf": sft_run.dir / "hf",
        "run": sft_run.dir / "checkpoints" / "step_40",
        "megatron": converted,
        "other-engine": sft_run.dir / "hf",
    }
    for name, model in models.items():
        directory = tmp_path / name
        config = write_config(
            tmp_path / f"{name}.yaml", BASE, run_dir=directory, model=model, evaluation={"num_prompts": 5}
        )
        overrides = ["rollout.engine.backend=hf"] if name == "other-engine" else []
        run("eval", "--config", config, *overrides, output=tmp_path / f"{name}.log")
        answers[name] = [row["response"] for row in read_lines(directory / "samples" / "step_0.jsonl")]
        summary = read_summary(directory)
        assert (summary["num_prompts"], summary["num_samples"]) == (5, 5)
        assert summary["interval_method"] == "wilson, 95%"
    assert answers["run"] == answers["hf"] == answers["megatron"] == answers["other-engine"]


@pytest.mark.slow
def test_sampled_evaluation_is_what_its_samples_say(tmp_path: Path, sft_run: FinishedRun) -> None:
    """pass@2 and cons@3 recounted from the saved samples by writing out every subset; a table by length."""
    directory = tmp_path / "eval"
    evaluation = {
        "num_prompts": 6,
        "num_samples_per_prompt": 4,
        "temperature": 1.0,
        "top_p": 0.95,
        "k": [1, 2, 3],
        "category_field": "metadata.num_terms",
    }
    config = write_config(
        tmp_path / "eval.yaml", BASE, run_dir=directory, model=sft_run.dir / "hf", evaluation=evaluation
    )
    output = run("eval", "--config", config, output=tmp_path / "eval.log")
    rows = read_lines(directory / "samples" / "step_0.jsonl")
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_index"], []).append(row)
    assert [len(group) for group in by_prompt.values()] == [4] * 6
    summary = read_summary(directory)
    assert (summary["num_prompts"], summary["num_samples"]) == (6, 24)
    assert summary["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / 24)
    passes, majorities = [], []
    for group in by_prompt.values():
        pairs = list(itertools.combinations(group, 2))
        passes.append(sum(any(row["correct"] for row in pair) for pair in pairs) / len(pairs))
        majorities.append(_majority(group, 3))
    assert summary["pass_at_2"] == pytest.approx(sum(passes) / 6)
    assert summary["cons_at_3"] == pytest.approx(sum(majorities) / 6)
    assert summary["interval_method"] == "bootstrap, 95%"
    assert summary["categories"]["2"]["accuracy"] == pytest.approx(summary["accuracy"])
    assert "pass@2" in output
    assert "cons@3" in output
    assert json.dumps(summary)


def _majority(group: list[dict[str, Any]], k: int) -> float:
    total = 0.0
    subsets = list(itertools.combinations(group, k))
    for subset in subsets:
        votes = [(row["vote"], row["correct"]) for row in subset if row["vote"] is not None]
        tops = [v for v in set(votes) if votes.count(v) == max(map(votes.count, votes))]
        total += sum(correct for _, correct in tops) / len(tops) if tops else 0.0
    return total / len(subsets)


@pytest.mark.slow
def test_sampled_evaluation_during_training(tmp_path: Path, sft_run: FinishedRun) -> None:
    """evaluation.k in a GRPO run: every evaluation logs pass@k and cons@k in addition to the accuracy."""
    directory = tmp_path / "grpo"
    evaluation = {
        "num_prompts": 4,
        "num_samples_per_prompt": 3,
        "temperature": 1.0,
        "k": [3],
        "interval": 1,
        "at_start": True,
    }
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=directory,
        model=sft_run.dir / "hf",
        evaluation=evaluation,
        training={"num_steps": 2},
    )
    run("grpo", "--config", config, output=tmp_path / "grpo.log")
    lines = read_lines(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert 12 * line["accuracy"] == pytest.approx(round(12 * line["accuracy"]))
        assert 4 * line["pass_at_3"] == pytest.approx(round(4 * line["pass_at_3"]))
        assert 0 <= line["cons_at_3"] <= line["pass_at_3"]
