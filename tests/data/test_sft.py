"""Demonstrations: token ids against HF, masks against one computed from the text."""

from __future__ import annotations

import copy
import json

import pytest

from megarl.config.schema import (
    PromptDataConfig,
    PromptFormat,
    ReasoningGymSource,
    SftDataConfig,
    SftJsonlSource,
    SftReasoningGymSource,
)
from megarl.data.prompts import load_prompts
from megarl.data.sft import load_demonstrations
from megarl.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
# As reasoning models do it: earlier answers lose their thoughts once another turn follows.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>old<|end|>"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(tokenizer, source, split="train", held_out=None, limit=400, **format_fields):
    config = SftDataConfig(train=source, held_out=held_out, format=PromptFormat(**format_fields))
    return load_demonstrations(config, tokenizer, max_sequence_length=limit, split=split)


def gym(**fields) -> SftReasoningGymSource:
    return SftReasoningGymSource(source="reasoning_gym", task="chain_sum", **fields)


def file(path: str) -> SftJsonlSource:
    return SftJsonlSource(source="jsonl", path=path)


def learned(tokenizer, sequence) -> str:
    """The text of the targets, a bar between runs of them."""
    runs, last = [], 0
    for token, mask in zip(sequence.token_ids, sequence.loss_mask, strict=True):
        if mask:
            if not last:
                runs.append([])
            runs[-1].append(token)
        last = mask
    return "|".join(tokenizer.decode(run) for run in runs)


def test_a_pair_is_the_rollout_s_prompt_then_the_answer_and_eos(tokenizer):
    fields = {"system_prompt": "Be brief.", "prompt_suffix": " Only the number."}
    demonstrations = load(tokenizer, gym(size=30), **fields)
    config = PromptDataConfig(
        train=ReasoningGymSource(source="reasoning_gym", task="chain_sum", size=30),
        format=PromptFormat(**fields),
    )
    prompts = load_prompts(config, tokenizer, max_prompt_tokens=400, split="train")
    for index in (0, 11, 29):
        prompt, sequence = prompts[index], demonstrations[index]
        answer = tokenizer(prompt.metadata["answer"], add_special_tokens=False)["input_ids"]
        assert sequence.token_ids == [*prompt.token_ids, *answer, tokenizer.eos_token_id]
        assert sequence.loss_mask == [0] * len(prompt.token_ids) + [1] * (len(answer) + 1)


def test_bare_pairs(tokenizer, jsonl):
    path = jsonl(json.dumps({"prompt": "1 + 2 =", "response": " 3"}))
    sequence = load(tokenizer, file(path), chat_template=False)[0]
    assert tokenizer.decode(sequence.token_ids) == "1 + 2 = 3<|end|>"
    assert learned(tokenizer, sequence) == " 3<|end|>"


@pytest.mark.parametrize("template", [None, CHATML])
def test_every_assistant_turn_is_learned_and_nothing_else(tokenizer, jsonl, template):
    tokenizer = copy.deepcopy(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "It is 2"},
        {"role": "user", "content": "+ 5?"},
        {"role": "assistant", "content": "\n7"},
    ]
    path = jsonl(json.dumps({"messages": messages}))
    sequence = load(tokenizer, file(path), prompt_suffix="!", system_prompt="Be brief.")[0]
    assert learned(tokenizer, sequence) == "It is 2<|end|>|\n7<|end|>"

    suffixed = [{**m, "content": m["content"] + "!"} if m["role"] == "user" else m for m in messages]
    full = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *suffixed], return_dict=False
    )
    assert sequence.token_ids == full[: len(sequence.token_ids)]
    # Only what follows the last EOS is cut off: a line break in ChatML, nothing in the tiny template.
    assert tokenizer.decode(full[len(sequence.token_ids) :]) == ("" if template is None else "\n")


def test_eos_is_added_where_the_template_ends_a_turn_with_another_token(tokenizer, jsonl):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|pad|>"
    path = jsonl(json.dumps({"prompt": "1 + 2?", "response": "3"}))
    assert learned(tokenizer, load(tokenizer, file(path))[0]) == "3<|end|><|pad|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, jsonl):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = FORGETFUL
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    single = json.dumps({"prompt": "a", "response": "b"})
    path = jsonl(single, json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r":2: the chat template writes message 1 differently"):
        load(tokenizer, file(path))
    assert learned(tokenizer, load(tokenizer, file(jsonl(single)))[0]) == "b<|end|>"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"prompt": "a"}', [":1:", "'response'"]),
        ('{"body": "a"}', [":1:", "messages", "prompt"]),
        ('{"prompt": "a", "response": ""}', [":1:", "'response'", "empty"]),
        ('{"messages": [], "prompt": "a"}', [":1:", "both"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', [":1:", "assistant's"]),
        ('{"messages": [{"role": "user", "content": 1}]}', [":1:", "messages[0].content"]),
        ('{"prompt": "a" "response"}', [":1:", "malformed JSON"]),
    ],
)
def test_bad_records_are_named(tokenizer, jsonl, record, words):
    with pytest.raises(UserError) as caught:
        load(tokenizer, file(jsonl(record)))
    for word in words:
        assert word in str(caught.value)


def test_lengths_seeds_and_missing_data(tokenizer, jsonl):
    path = jsonl(json.dumps({"prompt": "1", "response": "2"}))  # user 1 end assistant 2 end
    assert len(load(tokenizer, file(path), limit=6)) == 1
    with pytest.raises(UserError, match=r":1: the demonstration has 6 tokens, but at most 5"):
        load(tokenizer, file(path), limit=5)
    with pytest.raises(UserError, match=r"data.held_out.seed: 40 .* 51 or more"):
        load(tokenizer, gym(size=50, seed=1), held_out=gym(size=10, seed=40))
    with pytest.raises(UserError, match="data.held_out: missing"):
        load(tokenizer, file(path), split="held_out")
    with pytest.raises(UserError, match="data.held_out.path"):
        load(tokenizer, file(path), held_out=file(path))
    with pytest.raises(UserError, match="data.train.path: no file"):
        load(tokenizer, file(path + "x"))
