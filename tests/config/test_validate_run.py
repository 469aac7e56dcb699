"""Rules about saving and profiling, through the command line's own reading of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.distill import DistillConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.config.metric_names import is_metric
from megarl.config.ppo import PpoConfig
from megarl.config.preference import DpoConfig, RmConfig
from megarl.config.sft import SftConfig
from megarl.errors import UserError
from tests.config.rules import violations


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"profile": {"steps": [1, "3-10"]}}, []),
        ({"profile": {"steps": [11, "9-12"]}}, ["profile.steps: the run ends with step 10 (got 11, 12)"]),
        (
            {"profile": {"steps": ["5-3"]}},
            ["profile.steps: a range must have first <= last (got '5-3')"],
        ),
        (
            {"profile": {"steps": [1], "ranks": [0, 2]}},
            ["profile.ranks: must be from 0 to 0 (got 2)"],
        ),
        ({"profile": {"ranks": [5]}}, []),  # nothing is profiled
        ({"checkpoint": {"keep_best_metric": "loss", "keep_best_mode": "min"}}, []),
        (
            {"checkpoint": {"keep_best_mode": "min"}},
            ["checkpoint.keep_best_mode: has no effect: checkpoint.keep_best_metric is not set (got 'min')"],
        ),
        (
            {"checkpoint": {"keep_best_metric": "validation_loss"}},
            [
                "checkpoint.keep_best_metric: validation_loss is computed on data.held_out, which is not set:"
                " set it, or this one to null"
            ],
        ),
        (
            {"checkpoint": {"keep_best_metric": "validation_los"}},
            [
                "checkpoint.keep_best_metric: no metric of this kind of run; did you mean validation_loss? "
                "(got 'validation_los')"
            ],
        ),
        (
            {"checkpoint": {"keep_best_metric": "nonsense"}},
            [
                "checkpoint.keep_best_metric: no metric of this kind of run; docs/metrics.md lists them (got "
                "'nonsense')"
            ],
        ),
    ],
)
def test_rules(sections: dict[str, Any], expected: list[str]) -> None:
    assert violations(**sections) == expected


@pytest.mark.parametrize(
    ("root", "metric", "is_one"),
    [
        (SftConfig, "accuracy", False),
        (SftConfig, "entropy", True),
        (GrpoConfig, "accuracy", True),
        (GrpoConfig, "pass_at_4", True),
        (GrpoConfig, "level_sums", True),
        (GrpoConfig, "pass_at_0", False),
        (GrpoConfig, "value_loss", False),
        (PpoConfig, "value_loss", True),
        (DpoConfig, "reward_accuracy", True),
        (DpoConfig, "center_loss", False),
        (RmConfig, "center_loss", True),
        (DistillConfig, "divergence_max", True),
    ],
)
def test_a_metric_belongs_to_kinds_of_runs(root: Any, metric: str, is_one: bool) -> None:
    assert is_metric(metric, root.metric_names) == is_one


def test_a_loss_of_ones_own_may_log_what_it_likes() -> None:
    online = {
        "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_new_tokens": 8},
        "evaluation": {"at_start": False, "at_end": False},
        "training": {"num_steps": 2},
        "checkpoint": {"keep_best_metric": "my_metric"},
    }
    [line] = violations(GrpoConfig, **online)
    assert line.startswith("checkpoint.keep_best_metric: no metric")
    assert violations(GrpoConfig, **online, algorithm={"loss": "own.module:term"}) == []


def test_ranks_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("profile: {steps: [1], ranks: [a]}\n")
    with pytest.raises(UserError, match=r"profile\.ranks\.0: input should be a valid integer \(got 'a'\)"):
        load_config(SftConfig, file)
