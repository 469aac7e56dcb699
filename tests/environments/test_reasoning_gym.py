"""Extracting an answer from a sentence."""

from __future__ import annotations

import pytest

from megarl.environments.reasoning_gym import last_number


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
