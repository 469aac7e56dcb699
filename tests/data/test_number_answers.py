"""Reference answers given as numbers in the file."""

from __future__ import annotations

import asyncio
import json

import pytest

from megarl.config.data import PromptDataConfig
from megarl.config.environments import RegexConfig
from megarl.data.prompts import load_prompts
from megarl.environments import grade, make_environment
from megarl.environments.math_worker import judge
from megarl.errors import UserError


def load(tokenizer, path):
    data = PromptDataConfig.model_validate({"train": {"source": "jsonl", "path": path}})
    return load_prompts(data, tokenizer, max_prompt_tokens=400, split="train")


def test_they_are_written_out_and_compared_as_numbers(tokenizer, jsonl):
    values = (0.00001, 1e16, 42.0, 7, "1e-5", "42.0")
    prompts = load(tokenizer, jsonl(*(json.dumps({"prompt": "?", "answer": value}) for value in values)))
    answers = [prompt.metadata["answer"] for prompt in prompts]
    assert answers == ["0.00001", "10000000000000000", "42", "7", "1e-5", "42.0"]

    right = ("0.00001", "$10^{16}$", "42.0", "7", "0.00001", "42")
    assert all(judge(*pair)["outcome"] == "equal" for pair in zip(answers, right, strict=True))

    regex = make_environment(RegexConfig(kind="regex", pattern=r"(?P<answer>\S+)"), "e")
    responses = ("1e-05", "1e16", "42", "7.0", "0.00001", "42")
    rewards = [
        asyncio.run(grade(regex, prompt, response))[0]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert rewards == [1, 1, 1, 1, 0, 0]  # a reference that is text is compared as text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_finite_number_is_a_bad_row(tokenizer, jsonl, value):
    path = jsonl(f'{{"prompt": "?", "answer": {value}}}')
    with pytest.raises(UserError, match=r"data\.jsonl:1: field 'answer' is -?(nan|inf), not an answer"):
        load(tokenizer, path)
