"""Rules about saving and profiling, through the command line's own reading of a file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.rules import violations


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"profile": {"steps": [1, "3-10"]}}, []),
        ({"profile": {"steps": [11, "9-12"]}}, ["profile.steps: the run ends with step 10 (got 11, 12)"]),
        (
            {"profile": {"steps": ["5-3"]}},
            ["profile.steps: a range goes from its smaller to its larger step (got '5-3')"],
        ),
        (
            {"profile": {"steps": [1], "ranks": [0, 2]}},
            ["profile.ranks: there are ranks 0 to 0 (got 2)"],
        ),
        ({"profile": {"ranks": [5]}}, []),  # nothing is profiled
        ({"checkpoint": {"keep_best_metric": "loss", "keep_best_mode": "min"}}, []),
        (
            {"checkpoint": {"keep_best_mode": "min"}},
            [
                "checkpoint.keep_best_mode: has nothing to compare: checkpoint.keep_best_metric is not set "
                "(got 'min')"
            ],
        ),
        (
            {"checkpoint": {"keep_best_metric": "validation_loss"}},
            ["checkpoint.keep_best_metric: validation_loss is measured on data.held_out, which is not set"],
        ),
    ],
)
def test_rules(sections: dict[str, Any], expected: list[str]) -> None:
    assert violations(**sections) == expected
