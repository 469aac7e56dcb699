"""Rewards from plain functions: arguments, sums, and errors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megarl.config.data import PromptDataConfig
from megarl.config.environments import FunctionConfig
from megarl.config.section import find_violations
from megarl.environments import grade, make_environment
from megarl.environments.base import VerifierError
from megarl.errors import UserError
from megarl.records import Prompt, token_ids

MODULE = """
import asyncio

def exact(prompt, response, answer):
    assert (prompt, answer) == ("1 + 1?", "2")
    return response.strip() == answer

async def brief(prompt, response, answer):
    await asyncio.sleep(0)
    return 1 / len(response)

def text(prompt, response, answer):
    return "good"

def nan(prompt, response, answer):
    return float("nan")
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def judged(response: str, *names: str, weights: list[float] | None = None) -> tuple[float, dict[str, Any]]:
    paths = [f"rewards_of_test:{name}" for name in names]
    environment = make_environment(FunctionConfig(kind="function", paths=paths, weights=weights), "e")
    prompt = Prompt(0, "<user>1 + 1?", token_ids([1]), {"question": "1 + 1?", "answer": "2"})
    return asyncio.run(grade(environment, prompt, response))


def test_values_are_added_up_with_their_weights() -> None:
    assert judged(" 2 ", "exact") == (1.0, {"exact": 1.0})
    assert judged("3", "exact") == (0.0, {"exact": 0.0})
    reward, info = judged("2 ", "exact", "brief", weights=[2.0, -0.5])
    assert (reward, info) == (2.0 - 0.25, {"exact": 1.0, "brief": 0.5})


@pytest.mark.parametrize(("name", "what"), [("text", "returned str, not a number"), ("nan", "returned nan")])
def test_no_number_is_a_failure_and_no_reward(name: str, what: str) -> None:
    with pytest.raises(VerifierError, match=f"{name} {what}"):
        judged("2", name)


def test_a_function_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^e\.paths: rewards_of_test has no missing$"):
        judged("2", "missing")


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"paths": ["no colon"]}, "paths"), ({"paths": ["a:b"], "weights": [1.0, 2.0]}, "weights")],
)
def test_rules(changes: dict[str, Any], field: str) -> None:
    config = FunctionConfig.model_validate({"kind": "function", **changes})
    [violation] = find_violations(config, partial=False)
    assert violation.path[-1] == field


def test_it_is_an_environment_of_data() -> None:
    row = {"source": "jsonl", "path": "x.jsonl", "environment": {"kind": "function", "paths": ["a:b"]}}
    config = PromptDataConfig.model_validate({"train": row})
    assert isinstance(config.train.environment, FunctionConfig)  # type: ignore[union-attr]
