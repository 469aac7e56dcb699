"""Templates by name: texts against TRL's, what is learned, and tokenizers that lack their tokens."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from megarl.config.chat_templates import CHAT_TEMPLATES
from megarl.config.data import PromptFormat, SftDataConfig, SftReasoningGymSource
from megarl.config.files import find_file_violations
from megarl.data.tokenizer import apply_format
from megarl.data.transcript import Transcripts
from megarl.errors import UserError

THEIRS = Path(trl.__file__).parent / "chat_templates"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
USER, MORE = ({"role": "user", "content": text} for text in ("hi", "more"))
PLAIN = [USER, {"role": "assistant", "content": " yo"}, MORE, {"role": "assistant", "content": "so"}]
SYSTEM = [{"role": "system", "content": "S"}, *PLAIN]
THOUGHT = [
    *SYSTEM[:2],
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\none"},
    MORE,
    {"role": "assistant", "content": "<think>\nsecond\n</think>\n\ntwo"},
]
TOOLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "b"},
]


def render(template, messages, prompt=False, tools=None):
    found = render_jinja_template(
        [copy.deepcopy(messages)],
        chat_template=template,
        add_generation_prompt=prompt,
        tools=tools,
        bos_token="<s>",
        eos_token="</s>",
    )
    return found[0][0]


@pytest.mark.parametrize(
    ("name", "theirs", "messages", "tools"),
    [
        *(("qwen3", "qwen3_training", m, t) for m in (PLAIN, SYSTEM, THOUGHT, TOOLS) for t in (None, [TOOL])),
        *(("llama3", "llama3", messages, None) for messages in (PLAIN, SYSTEM)),
        ("gemma", "gemma", PLAIN, None),
        *(("deepseek_r1", "deepseek_r1_distill_training", messages, None) for messages in (SYSTEM, THOUGHT)),
    ],
)
def test_texts_are_trls(name, theirs, messages, tools):
    """DeepSeek's prompt opens <think>; in training the message has it, so that it is learned."""
    reference = (THEIRS / f"{theirs}.jinja").read_text()
    for end, prompt in itertools.product(range(1, len(messages) + 1), (False, True)):
        ours = render(CHAT_TEMPLATES[name].text, messages[:end], prompt, tools)
        expected = render(reference, messages[:end], prompt, tools)
        assert ours == (expected.removesuffix("<think>\n") if name == "deepseek_r1" and prompt else expected)


def test_chatml_and_mistral():
    """As their authors print them."""
    assert render(CHAT_TEMPLATES["chatml"].text, SYSTEM[:3], prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n yo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHAT_TEMPLATES["mistral"].text, [SYSTEM[0], USER, SYSTEM[4], MORE]) == (
        "<s>[INST] S\n\nhi[/INST] so</s>[INST] more[/INST]"
    )


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_turn_is_learned_with_what_ends_it(name, tokenizer):
    """Earlier reasoning too, which the models' own templates leave out."""
    tokenizer = copy.deepcopy(tokenizer)
    template = CHAT_TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})
    prompt_format = PromptFormat(chat_template=name)
    apply_format(tokenizer, prompt_format)
    end = template.ends_turns or tokenizer.eos_token
    assert tokenizer.eos_token == end
    messages = THOUGHT[1:] if name == "gemma" else THOUGHT
    sequence = Transcripts(tokenizer, prompt_format, 400, "row").conversation("x", messages)
    pairs = list(zip(sequence.token_ids, sequence.loss_mask, strict=True))
    learned = tokenizer.decode([token for token, mask in pairs if mask])
    answers = learned.split(end)
    assert answers.pop() == ""
    assert [answer.lstrip() for answer in answers] == [
        m["content"] for m in messages if m["role"] == "assistant"
    ]


def test_a_tokenizer_without_the_tokens(tokenizer):
    with pytest.raises(UserError) as raised:
        apply_format(copy.deepcopy(tokenizer), PromptFormat(chat_template="chatml"))
    assert str(raised.value).startswith(
        "data.format.chat_template: chatml writes <|im_start|>, <|im_end|>, which"
    )


def test_a_name_that_is_none():
    data = SftDataConfig(
        train=SftReasoningGymSource(source="reasoning_gym", task="chain_sum"),
        format=PromptFormat(chat_template="chatlm"),
    )

    class Root(SftDataConfig):
        data: SftDataConfig

    root = Root.model_construct(data=data)
    [violation] = [v for v in find_file_violations(root) if v.path[:2] == ("data", "format")]
    assert "no template of this name (they are chatml, llama3," in violation.message
