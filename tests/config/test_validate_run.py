"""Rules about saving and profiling, through the command line's own reading of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import load_config
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
            ["checkpoint.keep_best_metric: validation_loss is computed on data.held_out, which is not set"],
        ),
    ],
)
def test_rules(sections: dict[str, Any], expected: list[str]) -> None:
    assert violations(**sections) == expected


def test_ranks_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("profile: {steps: [1], ranks: [a]}\n")
    with pytest.raises(UserError, match=r"profile\.ranks\.0: input should be a valid integer \(got 'a'\)"):
        load_config(SftConfig, file)
