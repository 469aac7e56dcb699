"""Forms of answers: numbers, boxes, equations, letters; compared with other trainers' verifiers."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal

import pytest

from megarl.config.environments import MultipleChoiceConfig
from megarl.environments import grade, make_environment
from megarl.environments.choice_text import chosen
from megarl.environments.math_text import read
from megarl.environments.math_worker import judge
from megarl.environments.multiple_choice import MultipleChoiceEnvironment
from megarl.environments.text import boxes, last_number, number_text, same_number, without_e_notation
from megarl.records import Prompt
from tests.environments.choice_forms import FORMS
from tests.environments.math_pairs import PAIRS


def earned(reference: str, response: str) -> int:
    reply = judge(reference, response)
    assert reply["outcome"] != "bad_reference", reply
    return int(reply["outcome"] == "equal")


@pytest.mark.parametrize(("reference", "right", "wrong"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_pairs_of_a_reference_and_responses(reference: str, right: list[str], wrong: list[str]):
    assert [response for response in right if not earned(reference, response)] == []
    assert [response for response in wrong if earned(reference, response)] == []


@pytest.mark.parametrize(
    "reference",
    sorted({reference for reference, _, _ in PAIRS if not reference.startswith(("$", "\\boxed"))}),
)
def test_a_reference_in_a_box_is_right(reference: str):
    assert earned(reference, f"So it is $\\boxed{{{reference}}}$.")


@pytest.mark.parametrize("choice", FORMS)
def test_forms_of_a_choice(choice: str | None):
    environment = MultipleChoiceEnvironment(MultipleChoiceConfig(kind="multiple_choice"))
    assert [text for text in FORMS[choice] if environment.choice(text) != choice] == []


@pytest.mark.parametrize(("old", "new"), [("B", "J"), ("B", "D")])
def test_every_letter_is_read_alike(old: str, new: str):
    """The forms of B with another letter in its place; MMLU-Pro has ten."""
    swap = str.maketrans({old: new, new: old})
    for text in FORMS[old]:
        swapped = " ".join(
            part.translate(swap) if part.strip("().:,*$`") == old else part for part in text.split(" ")
        )
        if old in swapped or new not in swapped:
            continue  # the letter is part of a longer piece
        assert chosen(swapped, "ABCDEFGHIJ") == new, swapped


def test_an_options_text_counts_as_its_letter():
    options = ["London", "Capital of France", "Berlin", "42"]
    for text in (r"\boxed{42}", "The answer is 42.", "<answer>42</answer>", r"\boxed{\text{42}}"):
        assert chosen(text, "ABCD", options) == "D"
    assert chosen(r"\boxed{\text{capital of France}}", "ABCD", options) == "B"
    assert chosen(r"\boxed{Paris}", "ABCD", options) is None
    assert chosen(r"\boxed{2}", "AB", ["2", "2"]) is None
    assert chosen("Answer: C", "AB", ["x", "y"]) is None  # there is no C


# Facts read from the tests of two public verifiers: what they give a response. No code of theirs is used.
# slime: tests/test_rm_{gpqa,math,math_dapo,deepscaler}.py at 624b824a; AReaL:
# tests/test_math_verify_reward.py at 4aef98d8.
SLIME_LETTERS = [
    ("The answer is B.", "ABCDEFGHIJ", "B"),
    ("Answer: C", "ABCDEFGHIJ", "C"),
    ("My choice is D", "ABCDEFGHIJ", "D"),
    ("A is correct here", "ABCDEFGHIJ", "A"),
    ("E is the correct option", "ABCDEFGHIJ", "E"),
    ("Final answer: B", "ABCDEFGHIJ", "B"),
    ("the final option is C", "ABCDEFGHIJ", "C"),
    ("we ruled out A, then B, settled on C", "ABCDEFGHIJ", "C"),
    ("Let me think… Answer: A is wrong.</think>The answer is B.", "ABCDEFGHIJ", "B"),
    ("no idea, sorry", "ABCDEFGHIJ", None),
    ("", "ABCDEFGHIJ", None),
    ("random text", "ABCDEFGHIJ", None),
]
SLIME_OPTIONS = [("I think the answer is B.", ["London", "Capital of France", "Berlin"], "B")]
SLIME_MATH = [
    ("42", r"first attempt \boxed{wrong}, final \boxed{42}", 1),
    (r"\frac{1}{2}", r"answer: \boxed{\frac{1}{2}}", 1),
    ("7", r"answer: \fbox{7}", 1),
    ("42", r"start \boxed{never closes", 0),
    ("42", r"Solution: \boxed{42}", 1),
    ("0.5", r"\boxed{\frac{1}{2}}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1),
    ("45", r"\boxed{45^\circ}", 1),
    (r"\frac{3}{4}", r"\boxed{3/4}", 1),
    ("43", r"\boxed{42}", 0),
    ("1+x", r"\boxed{x+1}", 1),
    (r"\boxed{42}", r"answer: \boxed{42}", 1),
    ("42", r"first, then \boxed{42}", 1),
    ("42", r"\boxed{x = 42}", 1),
    ("100", r"\boxed{100 dollars}", 1),
    ("42", r"\boxed{42 square}", 1),
    ("1234567", r"\boxed{1,234,567}", 1),
    (r"\text{hello}", r"\boxed{\text{hello}}", 1),
    ("42", "Long solution. Answer: 42", 1),
    ("42", "Answer: 41 was a wrong guess.\nAnswer: 42", 1),
    ("42", r"Let me reconsider. \boxed{99}</think>Final: \boxed{42}", 1),
    ("42", r"</think>\boxed{43}", 0),
    ("0.5", r"</think>\boxed{\frac{1}{2}}", 1),
    ("42", "plain</think>no box here", 0),
]
# Where this judge says otherwise, and why.
SLIME_DIFFERENT = [
    (
        r"\frac{1}{2}",
        r"\boxed{\frac{2}{4}}",
        1,
        "slime wants fractions in lowest terms; here equal values are equal",
    ),
    ("42", "just 42", 1, "slime wants a box; here `extract: boxed` does"),
    ("42", r"\boxed{42}" + " filler" * 60, 1, "slime looks at the last 300 characters"),
]
AREAL_MATH = [
    ("4", "The answer is 4", 1),
    ("1/2", "The answer is 0.5", 1),
    ("4", "Step 1: 2+2=4. \\boxed{4}", 1),
    ("4", "The answer is 5", 0),
    ("4", "", 0),
    ("2", r"$\sqrt{4} = 2$", 1),
    ("90", "The angle is [60].", 0),
    ("90", "The answer is 90 degrees.", 1),
    ("90", "The angle is [ 90 ].", 1),
    ("4", "The answer is !!!invalid!!!", 0),
    ("2^3", "The answer is 8", 1),
    ("4", r"The answer is $\sqrt{16}$", 1),
    ("5/6", r"The answer is $\frac{5}{6}$", 1),
    ("-15", "-15", 1),
    ("3", "x = 3", 1),
    ("42", "Step 1: Calculate\nStep 2: Simplify\nFinal answer: 42", 1),
    ("1000", "$10^3$", 1),
    ("-3", "[-3]", 1),
    ("2", r"[$\sqrt{4}$]", 1),
    ("10000", "[$10^4$]", 1),
    ("2", r"[$\sqrt{\sqrt{16}}$]", 1),
    ("999999999999999", "999999999999999", 1),
    ("0.0000001", "0.0000001", 1),
    ("12/3", "4", 1),
    ("3/12", "4", 0),
    ("5", "3+2", 1),
    ("4", "x = 4", 1),
    ("-1", r"$e^{i\pi} = -1$", 1),
    ("1000", r"$10^3 = 1000$", 1),
    ("1000", r"$1 \times 10^3$", 1),
    ("3", r"$\begin{vmatrix} 2 & 1 \\ 1 & 2 \end{vmatrix} = 3$", 1),
    ("2/3", r"$\frac{\frac{1}{2}}{\frac{3}{4}} = \frac{2}{3}$", 1),
    ("10", r"$\binom{5}{2} = 10$", 1),
    ("1", r"$\sin\left(\frac{\pi}{2}\right) = 1$", 1),
    ("5", r"[$\sqrt{3^2 + 4^2}$] = [5]", 1),
    ("1", r"$\lim_{x \to 0} \frac{\sin x}{x} = 1$", 1),
    ("3", "The result is $3$", 1),
    ("2", r"$\left| 3 - 5 \right| = 2$", 1),
    ("2", r"$17 \bmod 5 = 2$", 1),
    ("3", r"$\log_2(8) = 3$", 1),
    (r"\boxed{0.066666793}", r"\boxed{0.0666668}", 1),
    (r"\boxed{0.066793}", r"\boxed{0.067}", 0),
    (r"\boxed{2.23}", r"\boxed{2.232}", 0),
    (r"\boxed{2.232}", r"\boxed{2.23}", 0),
    ("0.6666667", r"The final answer is \boxed{2/3}.", 1),
    ("10000", r"Area equals \boxed{10^4} square units", 1),
    ("0.25 + 3", r"Result: \boxed{(1/2)^{2} + \sqrt{9}}", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"$\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$", 1),
    ("2*pi", r"$2\pi$", 1),
    ("pi*r^2", r"$\pi r^2$", 1),
    ("1/3", "0.333333333", 1),
    ("sqrt(2)", r"\boxed{\sqrt{2}}", 1),
]


# Square brackets are the form that AReaL's geometry3k asks for; here it is a `regex`.
AREAL_DIFFERENT = [
    ("90", "The angle is [90].", 0),
    ("5", "The length is [5.0].", 0),
    ("0.5", "The ratio is [1/2].", 0),
    ("45", "[45 degrees]", 0),
    ("45", "First try [30], second try [45].", 0),
]


@pytest.mark.parametrize(("response", "letters", "choice"), SLIME_LETTERS)
def test_slimes_table_of_letters(response: str, letters: str, choice: str | None):
    assert chosen(response, letters) == choice


def test_slimes_options():
    for response, options, choice in SLIME_OPTIONS:
        assert chosen(response, "ABC", options) == choice


@pytest.mark.parametrize(("reference", "response", "value"), SLIME_MATH)
def test_slimes_table_of_mathematics(reference: str, response: str, value: int):
    assert earned(reference, response) == value


@pytest.mark.parametrize(("reference", "response", "value", "why"), SLIME_DIFFERENT)
def test_where_slime_says_otherwise(reference: str, response: str, value: int, why: str):
    assert earned(reference, response) == value


@pytest.mark.parametrize(("reference", "response", "value"), [*AREAL_MATH, *AREAL_DIFFERENT])
def test_areals_table(reference: str, response: str, value: int):
    assert earned(reference, response) == value


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.00001, "0.00001"),
        (1e16, "10000000000000000"),
        (42.0, "42"),
        (-0.5, "-0.5"),
        (2.5e-3, "0.0025"),
        (100, "100"),
        (100.0, "100"),
        (1.10, "1.1"),
        (123456789.125, "123456789.125"),
        (Decimal("1E+3"), "1000"),
        (Decimal("0.50"), "0.5"),
        (0.0, "0"),
        (-7, "-7"),
    ],
)
def test_a_number_as_text(number: float, text: str):
    assert number_text(number) == text
    assert float(text) == float(number)


def test_numbers_within_text():
    assert without_e_notation("1e-05 and 6.02E+23, 2e - 5, e-5, 0x1e5, 1e5m") == (
        "0.00001 and 602000000000000000000000, 2e - 5, e-5, 0x1e5, 1e5m"
    )
    assert last_number("so 2.5e-3.") == "0.0025"
    assert last_number("one of 1,2,3") == "3"
    assert last_number("it is .5") == ".5"
    assert last_number("about 1,234,567.5 km") == "1234567.5"
    assert same_number("42.0", "42")
    assert same_number("1,000", "1000")
    assert not same_number("42", "42a")
    assert not same_number("nan", "nan")


def test_boxes_are_found_in_linear_time_and_nested_ones_read_from_within():
    assert boxes(r"\boxed{a \boxed{b} c} \boxed{}") == [(9, 18, "b")]
    assert boxes(r"\boxed{\{1\}} \boxed 4 \boxed{open") == [(0, 13, r"\{1\}"), (14, 22, "4")]
    assert boxes("\\boxed{" * 20_000) == []
    assert read("1" * 40_000 + "x", several=True, euler=False).sides == []


def test_decimals_near_zero_are_told_apart():
    for exponent in range(4, 20):
        assert earned(f"1e-{exponent}", f"1e-{exponent}")
        assert not earned(f"1e-{exponent}", f"2e-{exponent}")
        assert not earned(f"1e-{exponent}", "0")
    assert math.isclose(float(without_e_notation("1e-19")), 1e-19)


def test_a_position_may_be_a_json_number():
    environment = make_environment(MultipleChoiceConfig(kind="multiple_choice"), "e")
    prompt = Prompt(3, "p", [1], {"answer": "2"})
    assert asyncio.run(grade(environment, prompt, r"$\boxed{\text{C}}$"))[0] == 1.0
