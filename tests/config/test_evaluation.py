"""Rules of evaluation.*: the exact line when one is broken, for `megarl eval` and for a GRPO run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.evaluate import EvalConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.errors import UserError

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 100}
EVAL: dict[str, Any] = {
    "run": {"dir": "r"},
    "model": {"path": "m"},
    "data": {"held_out": {**GYM, "seed": 100}},
    "rollout": {"max_new_tokens": 8},
    "evaluation": {"num_prompts": 3},
}
GRPO: dict[str, Any] = {
    **EVAL,
    "data": {"train": {**GYM, "seed": 0}, "held_out": {**GYM, "seed": 100}},
    "rollout": {"max_new_tokens": 8, "num_prompts_per_step": 2, "num_generations_per_prompt": 2},
    "optimizer": {"lr": 1e-3},
    "training": {"num_steps": 1},
}
SAMPLED = ["evaluation.temperature=1", "evaluation.num_samples_per_prompt=4"]
BROKEN = [
    (
        ["evaluation.num_samples_per_prompt=4"],
        "evaluation.num_samples_per_prompt: at evaluation.temperature = 0 all samples of a prompt are equal"
        " (got 4)",
    ),
    (
        ["evaluation.top_p=0.9"],
        "evaluation.top_p: has no effect at evaluation.temperature = 0 (greedy) (got 0.9)",
    ),
    (
        [*SAMPLED, "evaluation.k=[1,5]"],
        "evaluation.k: k must be at most evaluation.num_samples_per_prompt = 4 (got 5)",
    ),
    (
        [*SAMPLED, "evaluation.k=[4]", "evaluation.consensus_draws=9"],
        "evaluation.consensus_draws: has no effect: needs evaluation.consensus: sampled (got 9)",
    ),
    (
        [*SAMPLED, "evaluation.k=[1]", "evaluation.consensus=sampled"],
        "evaluation.consensus: needs a k above 1 in evaluation.k (got 'sampled')",
    ),
]


def lines(tmp_path: Path, kind: type[EvalConfig | GrpoConfig], overrides: list[str]) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(EVAL if kind is EvalConfig else GRPO))
    try:
        load_config(kind, file, overrides, check_files=False)
    except UserError as error:
        return [line.split(" [")[0] if "[1,5]" not in line else line for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize("kind", [EvalConfig, GrpoConfig])
@pytest.mark.parametrize(("overrides", "line"), BROKEN)
def test_broken(tmp_path: Path, kind: type[EvalConfig | GrpoConfig], overrides: list[str], line: str) -> None:
    assert lines(tmp_path, kind, overrides) == [line]


@pytest.mark.parametrize("kind", [EvalConfig, GrpoConfig])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["evaluation.num_prompts=null"],
        [*SAMPLED, "evaluation.k=[1,4]", "evaluation.top_p=0.9"],
        [*SAMPLED, "evaluation.k=[4]", "evaluation.consensus=sampled", "evaluation.consensus_draws=9"],
    ],
)
def test_accepted(tmp_path: Path, kind: type[EvalConfig | GrpoConfig], overrides: list[str]) -> None:
    assert lines(tmp_path, kind, overrides) == []


def test_a_megatron_checkpoint_is_a_model_to_evaluate_and_to_train(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_3"
    checkpoint.mkdir()
    (checkpoint / ".metadata").write_bytes(b"")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(EVAL))
    assert load_config(EvalConfig, file, [f"model.path={checkpoint}"]).model.path == str(checkpoint)
    file.write_text(yaml.safe_dump(GRPO))
    assert load_config(GrpoConfig, file, [f"model.path={checkpoint}"]).model.path == str(checkpoint)


def test_a_benchmarks_local_copy_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".metadata").write_bytes(b"")
    source = {"source": "benchmark", "name": "gsm8k", "directory": str(tmp_path / "none")}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**EVAL, "data": {"held_out": source}}))
    with pytest.raises(
        UserError, match=r"data\.held_out\.directory: no such file or directory \(got '.*none'\)"
    ):
        load_config(EvalConfig, file, [f"model.path={tmp_path / 'checkpoint'}"])
