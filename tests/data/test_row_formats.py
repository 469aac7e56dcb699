"""Formats of public datasets: texts and masks against TRL's functions on the same rows, and near misses."""

from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset
from trl.data_utils import (
    apply_chat_template,
    extract_prompt,
    maybe_convert_to_chatml,
    unpair_preference_dataset,
)

from megarl.config.data import JsonlSource, PromptDataConfig, PromptFormat, SftDataConfig, SftJsonlSource
from megarl.config.preference import PreferenceDataConfig, PreferenceJsonlSource
from megarl.config.row_formats import FORMATS
from megarl.data.preference import load_pairs
from megarl.data.prompts import load_prompts, questions_of
from megarl.data.row_formats import recognise, split_texts
from megarl.data.sft import load_demonstrations
from megarl.errors import UserError
from tests.config.rules import data_violations

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "+ 5?"},
    {"role": "assistant", "content": "7"},
]
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in TURNS]


@pytest.fixture
def rows(jsonl):
    """Write rows to a file; return its path."""
    return lambda *records: jsonl(*map(json.dumps, records))


def sft(tokenizer, path, *, row_format="auto", columns=None, **format_fields):
    source = SftJsonlSource(source="jsonl", path=path, row_format=row_format, **(columns or {}))
    config = SftDataConfig(train=source, format=PromptFormat(**format_fields))
    return load_demonstrations(config, tokenizer, max_sequence_length=400, split="train")


def dpo(tokenizer, path, *, row_format="auto", on_bad_row="error", **format_fields):
    source = PreferenceJsonlSource(source="jsonl", path=path, row_format=row_format)
    config = PreferenceDataConfig(train=source, on_bad_row=on_bad_row, format=PromptFormat(**format_fields))
    return load_pairs(config, tokenizer, max_sequence_length=400, split="train")


def prompts(tokenizer, path, **columns):
    source = JsonlSource(source="jsonl", path=path, **columns)
    return load_prompts(PromptDataConfig(train=source), tokenizer, max_prompt_tokens=400, split="train")


def parts(tokenizer, sequence):
    """(text without a loss, text with a loss)."""
    pairs = list(zip(sequence.token_ids, sequence.loss_mask, strict=True))
    return tuple(tokenizer.decode([t for t, m in pairs if bool(m) == learned]) for learned in (False, True))


def same(first, second) -> bool:
    return all(
        a.token_ids.tolist() == b.token_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        for a, b in zip(first, second, strict=True)
    )


def until_eos(tokenizer, text):
    """A template's line break after the last EOS is never sampled."""
    return text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]


def test_sharegpt_is_chatml_as_trl_converts_it(tokenizer, rows):
    """Also where TRL keeps a role's name: its "human" is the template's user."""
    row = {"conversations": [{"from": t["role"], "value": t["content"]} for t in TURNS]}
    converted = maybe_convert_to_chatml(copy.deepcopy(row))
    assert converted == {"messages": TURNS}
    expected = sft(tokenizer, rows(converted))
    assert "".join(parts(tokenizer, expected[0])) != ""
    for form in (row, {"conversations": SHAREGPT}, {"conversations": SHAREGPT[1:], "system": "Be brief."}):
        assert same(sft(tokenizer, rows(form)), expected)
    column = {"messages_field": "talk"}
    named = sft(tokenizer, rows({"talk": SHAREGPT}), row_format="sharegpt", columns=column)
    assert same(named, expected)


def test_openais_messages(tokenizer, rows):
    """Text parts are one text, and developer is the newer name of the system role."""
    parted = [
        {**turn, "content": [{"type": "text", "text": text} for text in turn["content"]]} for turn in TURNS
    ]
    parted[0]["role"] = "developer"
    assert same(sft(tokenizer, rows({"messages": parted})), sft(tokenizer, rows({"messages": TURNS})))
    parted[1]["content"].append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(UserError, match=r"messages\[1\].content: only parts of type text .*'image_url'"):
        sft(tokenizer, rows({"messages": parted}))


def test_prompt_and_completion_as_trl_renders_them(tokenizer, rows):
    """Only the completion is learned, also where the prompt holds an answer of the assistant."""
    row = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    rendered = apply_chat_template(copy.deepcopy(row), tokenizer)
    [sequence] = sft(tokenizer, rows(row))
    assert parts(tokenizer, sequence) == (
        rendered["prompt"],
        until_eos(tokenizer, rendered["completion"]),
    )
    texts = {"prompt": "The sky is", "completion": " blue."}
    [sequence] = sft(tokenizer, rows(texts), chat_template=False)
    assert parts(tokenizer, sequence) == ("The sky is", " blue." + tokenizer.eos_token)
    assert same(
        sft(tokenizer, rows(texts)),
        sft(tokenizer, rows({"prompt": "The sky is", "response": " blue."})),
    )


def test_alpaca(tokenizer, rows):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    asked = {"prompt": "Add.\n\n1 and 2", "response": "3"}
    assert same(sft(tokenizer, rows(row)), sft(tokenizer, rows(asked)))
    bare = sft(
        tokenizer,
        rows({"instruction": "Add.", "input": "", "output": "3", "text": "### Add"}),
        row_format="alpaca",
    )
    assert same(bare, sft(tokenizer, rows({"prompt": "Add.", "response": "3"})))
    earlier = row | {"system": "Be brief.", "history": [["1 + 1?", "2"]]}
    turns = [*TURNS[:3], {"role": "user", "content": asked["prompt"]}, {"role": "assistant", "content": "3"}]
    assert same(sft(tokenizer, rows(earlier)), sft(tokenizer, rows({"messages": turns})))


def test_alpaca_as_prompts(tokenizer, rows):
    path = rows({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    [prompt] = prompts(tokenizer, path)
    assert (prompt.metadata["question"], prompt.metadata["answer"]) == ("Add.\n\n1 and 2", "3")
    assert list(questions_of(JsonlSource(source="jsonl", path=path), "data.train")) == ["Add.\n\n1 and 2"]


def test_implicit_prompts_are_trls(tokenizer, rows):
    talks = {"chosen": TURNS[:3], "rejected": [*TURNS[:2], {"role": "assistant", "content": "3"}]}
    [pair] = dpo(tokenizer, rows(talks))
    [explicit] = dpo(tokenizer, rows(extract_prompt(talks)))
    assert same([pair.chosen, pair.rejected], [explicit.chosen, explicit.rejected])
    texts = {"chosen": "Q: 1 + 1?\nA: two", "rejected": "Q: 1 + 1?\nA: a lot"}
    assert split_texts("", **texts) == tuple(extract_prompt(texts).values())
    [pair] = dpo(tokenizer, rows(texts), chat_template=False)
    end = tokenizer.eos_token
    assert parts(tokenizer, pair.chosen) == ("Q: 1 + 1?\nA:", f" two{end}")
    assert parts(tokenizer, pair.rejected) == ("Q: 1 + 1?\nA:", f" a lot{end}")
    with pytest.raises(UserError, match="no field 'prompt'; .* need data.format.chat_template: false"):
        dpo(tokenizer, rows(texts))


def test_the_prompt_of_texts_ends_with_a_word():
    """Where TRL cuts a word, the prompt ends before it."""
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert extract_prompt(texts)["prompt"] == "The sky is bl"
    assert split_texts("", **texts) == ("The sky is", " blue.", " black.")
    for chosen, rejected in (("blue", "black"), ("The", "The sky"), ("the same", "the same")):
        with pytest.raises(UserError, match="must begin with the same words and go on differently"):
            split_texts("data:1", chosen, rejected)


@pytest.mark.parametrize("conversational", [True, False])
def test_unpaired_rows_are_paired_again(tokenizer, rows, conversational):
    """TRL's function takes pairs apart, chosen responses first; what it gives makes the same pairs."""
    pairs = [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {"prompt": "1 + 2?", "chosen": "3", "rejected": "4"},
        {"prompt": "1 + 1?", "chosen": "two", "rejected": "three"},
    ]
    if conversational:
        as_chat = lambda name, text: [{"role": "user" if name == "prompt" else "assistant", "content": text}]  # noqa: E731
        pairs = [{name: as_chat(name, text) for name, text in pair.items()} for pair in pairs]
    unpaired = list(unpair_preference_dataset(Dataset.from_list(pairs)))
    assert [row["label"] for row in unpaired] == [True] * 3 + [False] * 3
    found, expected = dpo(tokenizer, rows(*unpaired)), dpo(tokenizer, rows(*pairs))

    def texts(data):
        return sorted((parts(tokenizer, p.chosen), parts(tokenizer, p.rejected)) for p in data)

    assert texts(found) == texts(expected)
    assert texts(dpo(tokenizer, rows(*unpaired), row_format="unpaired_preference")) == texts(expected)
    with pytest.raises(UserError, match=r"data.jsonl:4: no undesirable response to the same prompt to pair"):
        dpo(tokenizer, rows(*(unpaired[:2] + unpaired[3:4] + unpaired[1:2] + unpaired[4:5])))
    path = rows(*unpaired[:4])
    kept = dpo(tokenizer, path, on_bad_row="skip")
    assert (len(kept), kept.reports[0].bad.count) == (1, 2)


def test_responses_to_sharegpt_and_alpaca_prompts(tokenizer, rows):
    """As LLaMA-Factory has them: one message each."""
    pair = {"prompt": TURNS[:4], "chosen": TURNS[4:], "rejected": [{"role": "assistant", "content": "8"}]}
    answers = {"chosen": {"from": "gpt", "value": "7"}, "rejected": {"from": "gpt", "value": "8"}}
    [expected] = dpo(tokenizer, rows(pair))
    [found] = dpo(tokenizer, rows({"conversations": SHAREGPT[:4], **answers}))
    assert same([found.chosen, found.rejected], [expected.chosen, expected.rejected])
    row = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    [found] = dpo(tokenizer, rows(row))
    [expected] = dpo(tokenizer, rows({"prompt": "Add.\n\n1 and 2", "chosen": "3", "rejected": "4"}))
    assert same([found.chosen, found.rejected], [expected.chosen, expected.rejected])


def test_calls_in_sharegpts_turns(rows):
    from megarl.data.row_fields import get_messages

    call = {"name": "add", "arguments": {"a": 1}}
    record = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
        ]
    }
    _, asked, result = get_messages(record, "conversations", "x")
    assert asked == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    assert result == {"role": "tool", "content": "2"}
    record["conversations"][1]["value"] = "add(1, 1)"
    with pytest.raises(UserError, match=r"x: conversations\[1\]: the calls are not valid JSON"):
        get_messages(record, "conversations", "x")


SFT = SftJsonlSource.usable
DPO = PreferenceJsonlSource.usable
GRPO = JsonlSource.usable
ULTRAFEEDBACK = "prompt prompt_id messages chosen rejected score_chosen score_rejected"


@pytest.mark.parametrize(
    ("usable", "columns", "error"),
    [
        (SFT, "prompt chosen rejected", "preference rows .*: megarl dpo and megarl rm train on them"),
        (SFT, "prompt completion label", "unpaired_preference rows .*: megarl dpo and megarl rm"),
        (SFT, "prompt completions labels", "stepwise_supervision rows .*: they train process reward models"),
        (SFT, "prompt answer", "no field 'response', or .*: megarl grpo, ppo, distill and eval take prompts"),
        (DPO, "messages", "messages rows .*: megarl sft trains on them"),
        (DPO, "prompt completion", "prompt_completion rows .*: megarl sft"),
        (DPO, "prompt completions labels", "stepwise_supervision rows"),
        (GRPO, "conversations", "sharegpt rows .*: megarl sft"),
        (GRPO, "text", "text rows .*: megarl sft"),
        (
            SFT,
            "instruction input",
            "no field 'output', which rows of format alpaca have .'instruction', 'output', .*; it has",
        ),
        (
            SFT,
            "conversation",
            r"no field 'conversations' \('conversation' is close\), which .* sharegpt",
        ),
        (SFT, "prompt respnse", r"no field 'response' \('respnse' is close\), .* prompt_response"),
        (DPO, "prompt chosen", "no field 'rejected', which rows of format preference have"),
        (DPO, "completion label", "no field 'prompt', which rows of format unpaired_preference have"),
        (
            SFT,
            "a b",
            "no known format of rows; it has 'a', 'b'; known here are messages: .messages., .tools.",
        ),
        (
            DPO,
            "prompt chosen rejected completion label",
            "columns of preference and unpaired_pref",
        ),
        (SFT, "messages text", "has the columns of messages and text rows; choose one with row_format"),
    ],
)
def test_what_a_job_cannot_use_is_named_with_the_job_that_can(usable, columns, error):
    record = {name: True if name == "label" else "x" for name in columns.split()}
    with pytest.raises(UserError, match=f"^data:1: .*{error}") as raised:
        recognise(record, "data:1", usable)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("usable", "columns", "name"),
    [
        (
            SFT,
            "prompt prompt_id messages chosen rejected score_chosen",
            "messages",
        ),  # ultrafeedback_binarized
        (DPO, "prompt prompt_id messages chosen rejected score_chosen", "preference"),
        (SFT, "id conversations", "sharegpt"),
        (SFT, "instruction context output category", "alpaca"),
        (SFT, "prompt completion label_of_class", "prompt_completion"),
    ],
)
def test_what_public_datasets_are_recognised_as(usable, columns, name):
    record = {column: True if column == "label" else "x" for column in columns.split()}
    assert recognise(record, "data:1", usable) == name


def test_a_named_format_needs_its_columns(tokenizer, rows):
    with pytest.raises(UserError, match="data.jsonl:1: no field 'output', which rows of format alpaca have"):
        sft(tokenizer, rows({"instruction": "a", "messages": TURNS}), row_format="alpaca")
    for name, column in {"text": "plain", "messages": TURNS}.items():
        both = sft(tokenizer, rows({"text": "plain", "messages": TURNS}), row_format=name)
        assert same(both, sft(tokenizer, rows({name: column})))


def test_formats_of_other_jobs_are_refused_in_the_configuration():
    sources = (
        (SftDataConfig, SftJsonlSource),
        (PreferenceDataConfig, PreferenceJsonlSource),
        (PromptDataConfig, JsonlSource),
    )
    for config, kind in sources:
        for name in FORMATS:
            section = config(train=kind(source="jsonl", path="x", row_format=name))
            said = [line for line in data_violations(section) if "not for this job" in line]
            assert bool(said) == (name not in kind.usable)
    section = SftDataConfig(
        train=SftJsonlSource(source="jsonl", path="x", row_format="alpaca", prompt_field="q")
    )
    assert any("alpaca have no such column" in line for line in data_violations(section))


def test_a_message_of_neither_kind(tokenizer, rows):
    turn = {"from": "human", "text": "x"}
    with pytest.raises(UserError, match=r"conversations\[0\]: a ShareGPT message .*lacks 'value'"):
        sft(tokenizer, rows({"conversations": [turn]}))
    with pytest.raises(UserError, match=r"conversations\[0\].role is 'bing'; known roles are"):
        sft(tokenizer, rows({"conversations": [{"from": "bing", "value": "x"}]}))
    with pytest.raises(UserError, match="chat_template_kwargs are set for all rows, by data.format"):
        sft(tokenizer, rows({"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}))
