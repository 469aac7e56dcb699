"""The checks between tokenizer and model, and the stop tokens."""

from __future__ import annotations

import copy
import json

import pytest

from megarl.config.data import PromptFormat
from megarl.data.tokenizer import check_tokenizer, load_tokenizer, stop_token_ids
from megarl.errors import UserError


def test_loads_what_was_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("What is 12 + 34?")["input_ids"] == tokenizer("What is 12 + 34?")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="model.path: no directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"model.path: .*tokenizer.* in") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="model.path: cannot load a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_fitting_tokenizer_passes_and_one_id_too_many_does_not(tokenizer):
    largest = max(tokenizer.get_vocab().values())
    check_tokenizer(tokenizer, largest + 1, PromptFormat())
    with pytest.raises(UserError) as caught:
        check_tokenizer(tokenizer, largest, PromptFormat())
    assert f"token id is {largest}," in str(caught.value)
    assert f"has {largest} entries" in str(caught.value)


def test_all_violations_are_listed(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(UserError) as caught:
        check_tokenizer(tokenizer, 10, PromptFormat())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.path", "model.path", "data.format.chat_template"]
    with pytest.raises(UserError, match="data.format.system_prompt"):
        check_tokenizer(tokenizer, 512, PromptFormat(chat_template=False, system_prompt="a"))


def test_a_tokenizer_that_ends_texts_with_eos_cannot_make_bare_prompts(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    check_tokenizer(tokenizer, 512, PromptFormat(chat_template=False))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    with pytest.raises(UserError, match="appends EOS to every text"):
        check_tokenizer(tokenizer, 512, PromptFormat(chat_template=False))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, []),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 9}, [5, 7]),
        ({}, {"eos_token_id": 9}, [9]),
        (None, {"eos_token_id": None}, []),
    ],
)
def test_stop_tokens_come_from_the_tokenizer_and_the_model(tokenizer, tmp_path, generation, config, expected):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_token_ids(tokenizer, tmp_path) == sorted({tokenizer.eos_token_id, *expected})


def test_bad_stop_tokens_are_named(tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "<|end|>"}')
    with pytest.raises(UserError, match="generation_config.json is '<|end|>'"):
        stop_token_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config.json:1: not valid JSON"):
        stop_token_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="names an EOS"):
        stop_token_ids(tokenizer, tmp_path)
