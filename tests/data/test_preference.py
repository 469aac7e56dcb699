"""Preference pairs: token ids against the tokenizer's own, every accepted form, every rejected one."""

from __future__ import annotations

import copy
import json

import pytest

from megarl.config.data import PromptFormat
from megarl.config.preference import (
    PreferenceDataConfig,
    PreferenceJsonlSource,
    PreferenceReasoningGymSource,
)
from megarl.data.preference import load_pairs
from megarl.errors import UserError
from tests.config.rules import data_violations

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1 + 1?"}
RIGHT = {"role": "assistant", "content": "2"}
WRONG = {"role": "assistant", "content": "It is 3"}
MORE = {"role": "user", "content": "+ 5?"}
LAST = {"role": "assistant", "content": "7"}


def load(tokenizer, source, split="train", held_out=None, limit=400, **format_fields):
    config = PreferenceDataConfig(train=source, held_out=held_out, format=PromptFormat(**format_fields))
    return load_pairs(config, tokenizer, max_sequence_length=limit, split=split)


def file(path: str) -> PreferenceJsonlSource:
    return PreferenceJsonlSource(source="jsonl", path=path)


def gym(**fields) -> PreferenceReasoningGymSource:
    return PreferenceReasoningGymSource(source="reasoning_gym", task="chain_sum", **fields)


def text(tokenizer, sequence, *, learned: bool) -> str:
    """The text of the targets, or of the rest."""
    mask = sequence.loss_mask
    return tokenizer.decode([t for t, m in zip(sequence.token_ids, mask, strict=True) if bool(m) == learned])


def test_bare_strings(tokenizer, jsonl):
    path = jsonl(json.dumps({"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 4, perhaps"}))
    [pair] = load(tokenizer, file(path), chat_template=False, prompt_suffix="?")
    prompt = tokenizer("1 + 2 =?")["input_ids"]
    assert pair.num_prompt_tokens == len(prompt)
    for sequence, response in ((pair.chosen, " 3"), (pair.rejected, " 4, perhaps")):
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert sequence.token_ids.tolist() == [*prompt, *ids, tokenizer.eos_token_id]
        assert sequence.loss_mask.tolist() == [0] * len(prompt) + [1] * (len(ids) + 1)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "It is 3"},
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": "1 + 1?", "chosen": [RIGHT], "rejected": "It is 3"},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": "1 + 1?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG], "score": 3},
    ],
)
def test_every_form_of_a_pair_gives_the_same_tokens(tokenizer, jsonl, record):
    [pair] = load(tokenizer, file(jsonl(json.dumps(record))), system_prompt="Be brief.")
    prompt = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    assert pair.num_prompt_tokens == len(prompt)
    for sequence, answer in ((pair.chosen, RIGHT), (pair.rejected, WRONG)):
        whole = tokenizer.apply_chat_template([SYSTEM, USER, answer], return_dict=False)
        assert sequence.token_ids.tolist() == whole
        assert sequence.loss_mask.tolist() == [0] * len(prompt) + [1] * (len(whole) - len(prompt))


def test_the_common_turns_are_the_prompt_and_only_the_assistant_is_learned(tokenizer, jsonl):
    """The first answer is in both; after it the conversations part, one of them over two more turns."""
    chosen = [SYSTEM, USER, RIGHT, MORE, {"role": "assistant", "content": "8"}, MORE, LAST]
    rejected = [SYSTEM, USER, RIGHT, MORE, WRONG]
    [pair] = load(tokenizer, file(jsonl(json.dumps({"chosen": chosen, "rejected": rejected}))))
    prompt = tokenizer.apply_chat_template(chosen[:4], add_generation_prompt=True, return_dict=False)
    assert pair.chosen.token_ids[: pair.num_prompt_tokens].tolist() == prompt
    assert text(tokenizer, pair.chosen, learned=True) == "8<|end|>7<|end|>"
    assert text(tokenizer, pair.rejected, learned=True) == "It is 3<|end|>"
    assert text(tokenizer, pair.rejected, learned=False) == tokenizer.decode(prompt)


BAD = [
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
    ({"prompt": "a", "chosen": 1, "rejected": "c"}, "'chosen' must be a string"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same tokens"),
    ({"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]}, "do not differ"),
    ({"chosen": [USER, RIGHT], "rejected": [USER, RIGHT, MORE, LAST]}, "do not differ"),
    ({"chosen": [USER, RIGHT], "rejected": [MORE, WRONG]}, "do not begin with the same message"),
    ({"chosen": [USER, RIGHT, MORE, LAST], "rejected": [USER, RIGHT, USER, WRONG]}, "found 'user'"),
    ({"prompt": "b", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "'prompt' differs from"),
    (
        {"prompt": [USER, RIGHT], "chosen": [LAST], "rejected": [WRONG]},
        "the prompt ends with an assistant message",
    ),
    (
        {"prompt": "a", "chosen": [RIGHT, MORE], "rejected": [WRONG]},
        "last message must have role 'assistant'",
    ),
    ({"prompt": "a", "chosen": [USER, RIGHT], "rejected": [WRONG]}, "'chosen' must continue with"),
    ({"prompt": [{"role": "user"}], "chosen": [RIGHT], "rejected": [WRONG]}, "prompt[0] must be an object"),
]


def test_bad_lines_are_named(tokenizer, jsonl):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for record, words in BAD:
        path = jsonl(json.dumps(good), json.dumps(record))
        with pytest.raises(UserError) as caught:
            load(tokenizer, file(path))
        assert str(caught.value).startswith(f"{path}:2: ")
        assert words in str(caught.value)


def test_three_bad_lines_are_enough(tokenizer, jsonl):
    path = jsonl(*[json.dumps({"prompt": "a", "chosen": "b"})] * 30)
    with pytest.raises(UserError) as caught:
        load(tokenizer, file(path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert lines[-1] == "data.train: 30 bad rows in all; data.on_bad_row: skip drops them"


def test_lengths_and_chat_without_a_template(tokenizer, jsonl):
    path = jsonl(json.dumps({"prompt": "1", "chosen": "2", "rejected": "34"}))  # user 1 end assistant 3 4 end
    assert len(load(tokenizer, file(path), limit=7)) == 1
    with pytest.raises(UserError, match=r":1: the response with its prompt has 7 tokens, but at most 6"):
        load(tokenizer, file(path), limit=6)
    path = jsonl(json.dumps({"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}))
    with pytest.raises(UserError, match=r":1: chat messages need data.format.chat_template: true"):
        load(tokenizer, file(path), chat_template=False)


def test_a_template_that_forgets_the_thoughts_of_earlier_turns_will_do(tokenizer, jsonl):
    """Only the responses need be written the same whatever follows; the prompt's turns may be rewritten."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>old<|end|>"
        "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    record = {"prompt": [USER, RIGHT, MORE], "chosen": "7", "rejected": "8"}
    [pair] = load(tokenizer, file(jsonl(json.dumps(record))))
    assert text(tokenizer, pair.chosen, learned=True) == "7<|end|>"
    assert "old" in text(tokenizer, pair.chosen, learned=False)


def test_generated_pairs(tokenizer):
    forms = ["The answer is {answer}.", "{other_answer}"]
    pairs = load(tokenizer, gym(size=40, rejected_templates=forms), chat_template=False)
    assert len(pairs) == 40
    answers = [text(tokenizer, pair.chosen, learned=True).removesuffix("<|end|>") for pair in pairs]
    for index, pair in enumerate(pairs):
        rejected = text(tokenizer, pair.rejected, learned=True).removesuffix("<|end|>")
        if index % 2 == 0:
            assert rejected == f"The answer is {answers[index]}."
        else:
            assert rejected in answers
            assert rejected != answers[index]
        assert pair == pairs[index]


def test_mismatched_responses_come_from_the_next_pair_with_another_prompt(tokenizer, jsonl):
    rows = [("1 + 1", "2", "3"), ("1 + 1", "2", "4"), ("5 + 1", "6", "777777777"), ("2 + 2", "4", "5")]
    path = jsonl(*(json.dumps(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) for r in rows))
    pairs = load(tokenizer, file(path), chat_template=False)
    chosen, rejected = pairs.mismatched(0)
    assert tokenizer.decode(chosen.token_ids) == "1 + 16<|end|>"
    assert text(tokenizer, chosen, learned=True) == "6<|end|>"
    assert text(tokenizer, rejected, learned=True) == "777777777<|end|>"
    assert text(tokenizer, pairs.mismatched(3)[1], learned=True) == "3<|end|>", "round to the first"
    rows = [("1 + 1", "2", "3"), ("5 + 1 + 1 + 1", "8", "7777777"), ("2 + 2", "4", "5")]
    path = jsonl(*(json.dumps(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) for r in rows))
    pairs = load(tokenizer, file(path), chat_template=False)
    tight = load(
        tokenizer, file(path), chat_template=False, limit=max(len(p.rejected.token_ids) for p in pairs)
    )
    assert text(tokenizer, tight.mismatched(1)[1], learned=True) == "5<|end|>"
    assert text(tokenizer, tight.mismatched(2)[1], learned=True) == "3<|end|>"
    same = jsonl(
        *[json.dumps({"prompt": "a", "chosen": "b", "rejected": c}) for c in "cd"], name="same.jsonl"
    )
    with pytest.raises(UserError, match=r"data.train: algorithm.loss = kto .* than pair 1"):
        load(tokenizer, file(same)).mismatched(1)


def test_seeds_of_held_out_problems():
    [line] = data_violations(PreferenceDataConfig(train=gym(size=50, seed=1), held_out=gym(size=10, seed=40)))
    assert line.startswith("data.held_out.seed: 10 problems")
    assert line.endswith("(got 40)")
