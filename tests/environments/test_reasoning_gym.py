"""Extracting an answer from a sentence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megarl.config.data import PromptReasoningGymSource
from megarl.environments.reasoning_gym import ReasoningGymEnvironment, last_number
from megarl.records import Prompt, token_ids


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 3.", "3"),
        ("12 + 7 = 19", "19"),
        ("= -3", "-3"),
        ("5-3", "3"),
        ("so 1,234.50 dollars", "1234.50"),
        ("4 - 9 = \u22125.", "-5"),
        ("x2 and none else", ""),
    ],
)
def test_last_number_reads_what_a_person_reads(text, number):
    assert last_number(text) == number


def test_where_the_answer_is_and_what_half_an_answer_earns() -> None:
    """chain_sum gives 0.4 here for a sentence with the answer in it."""

    def reward(response: str, **settings: Any) -> float:
        source = PromptReasoningGymSource(source="reasoning_gym", task="chain_sum", size=1, **settings)
        environment = ReasoningGymEnvironment(source)
        entry = environment._dataset[0]
        prompt = Prompt(0, "p", token_ids([1]), {"entry": entry})
        return asyncio.run(environment.judge(prompt, response.format(entry["answer"])))[0]

    said = "I would say {} here"
    assert 0 < reward(said, partial_credit=True) < 1
    assert reward(said, partial_credit=False) == 0.0
    assert reward(said, extract="last_number", partial_credit=False) == 1.0
    assert reward("{}", partial_credit=False) == 1.0
