"""Demonstrations in several forms."""

from __future__ import annotations

import pytest
import reasoning_gym

from megarl.config.data import PromptFormat, SftDataConfig, SftReasoningGymSource
from megarl.data.sft import load_demonstrations
from megarl.errors import UserError

CHAIN = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_forms_alternate_and_carry_the_reference_answer(tokenizer):
    source = SftReasoningGymSource(
        source="reasoning_gym",
        task="chain_sum",
        arguments=CHAIN,
        size=6,
        response_templates=["{answer}", "The answer is {answer}."],
    )
    config = SftDataConfig(train=source, format=PromptFormat(chat_template=False))
    demonstrations = load_demonstrations(config, tokenizer, max_sequence_length=128, split="train")
    entries = reasoning_gym.create_dataset("chain_sum", seed=1, size=6, **CHAIN)
    for i in range(6):
        sequence = demonstrations[i]
        ids = [t for t, m in zip(sequence.token_ids, sequence.loss_mask, strict=True) if m]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answer = entries[i]["answer"]
        assert text.strip() == (answer if i % 2 == 0 else f"The answer is {answer}.")


@pytest.mark.parametrize("templates", [[], ["{answer}", "always 7"]])
def test_a_form_without_the_answer_is_refused(tokenizer, templates):
    source = SftReasoningGymSource(
        source="reasoning_gym", task="chain_sum", arguments=CHAIN, response_templates=templates
    )
    config = SftDataConfig(train=source, format=PromptFormat(chat_template=False))
    with pytest.raises(UserError, match="data.train.response_templates"):
        load_demonstrations(config, tokenizer, max_sequence_length=128, split="train")
