"""Demonstrations: token ids against HF, masks against one computed from the text."""

from __future__ import annotations

import copy
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megarl.config.data import (
    PromptDataConfig,
    PromptFormat,
    PromptReasoningGymSource,
    SftDataConfig,
    SftJsonlSource,
    SftReasoningGymSource,
)
from megarl.data.prompts import load_prompts
from megarl.data.sft import load_demonstrations
from megarl.data.tokenizer import apply_format
from megarl.errors import UserError
from tests.config.rules import data_violations

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
# Like reasoning models: earlier answers lose their thoughts once another turn follows.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>old<|end|>"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# As DeepSeek-R1's distillates: <think> stands in the prompt, and messages are shown without their reasoning.
OPENS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1].strip() + '<|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As Qwen3: the last answer has its thoughts (or an empty place for them), earlier ones do not.
QWEN3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{{ '<|assistant|>' }}{% if loop.last %}{{ '<think>' + (parts[0].split('<think>')[-1] if parts|length > 1"
    " else '\n\n') + '</think>\n\n' }}{% endif %}{{ parts[-1].strip() + '<|end|>\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is defined and not"
    " enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def load(tokenizer, source, split="train", held_out=None, limit=400, learned_turns="all", **format_fields):
    config = SftDataConfig(
        train=source,
        held_out=held_out,
        format=PromptFormat(**format_fields),
        learned_turns=learned_turns,
    )
    return load_demonstrations(config, tokenizer, max_sequence_length=limit, split=split)


def gym(**fields) -> SftReasoningGymSource:
    return SftReasoningGymSource(source="reasoning_gym", task="chain_sum", **fields)


def file(path: str) -> SftJsonlSource:
    return SftJsonlSource(source="jsonl", path=path)


def learned(tokenizer, sequence) -> str:
    """Return the text of the targets, with a bar between runs of them."""
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
        train=PromptReasoningGymSource(source="reasoning_gym", task="chain_sum", size=30),
        format=PromptFormat(**fields),
    )
    prompts = load_prompts(config, tokenizer, max_prompt_tokens=400, split="train")
    for index in (0, 11, 29):
        prompt, sequence = prompts[index], demonstrations[index]
        answer = tokenizer(prompt.metadata["answer"], add_special_tokens=False)["input_ids"]
        assert sequence.token_ids.tolist() == [*prompt.token_ids, *answer, tokenizer.eos_token_id]
        assert sequence.loss_mask.tolist() == [0] * len(prompt.token_ids) + [1] * (len(answer) + 1)


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
    assert sequence.token_ids.tolist() == full[: len(sequence.token_ids)]
    # Only what follows the last EOS is cut off: a line break in ChatML, nothing in the tiny template.
    assert tokenizer.decode(full[len(sequence.token_ids) :]) == ("" if template is None else "\n")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((None, None, 1), "It is 2<|end|>|7<|end|>|9<|end|>"),
        ((1, 0, 1), "It is 2<|end|>|9<|end|>"),
        ((0, 1, 0), "7<|end|>"),
        ((0.0, 0, 1.0), "9<|end|>"),
    ],
)
def test_weights_of_openai_s_messages(tokenizer, jsonl, weights, expected):
    """A turn of weight 0 is context: the tokens are the same, up to the last target."""
    texts = [("1 + 1?", "It is 2"), ("+ 5?", "7"), ("+ 2?", "9")]
    plain = [
        {"role": role, "content": text}
        for pair in texts
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    given = [dict(each) for each in plain]
    for message, weight in zip(given[1::2], weights, strict=True):
        message |= {} if weight is None else {"weight": weight}
    whole, sequence = load(tokenizer, file(jsonl(*(json.dumps({"messages": m}) for m in (plain, given)))))
    assert learned(tokenizer, sequence) == expected
    length = len(sequence.token_ids)
    assert sequence.token_ids.tolist() == whole.token_ids[:length].tolist()
    assert length == len(whole.token_ids) or weights[-1] == 0
    # The response of a pair has them too; learned_turns: last asks for the last turn.
    pair = json.dumps({"prompt": given[:-1], "completion": [given[-1] | {"weight": 1}]})
    assert learned(tokenizer, load(tokenizer, file(jsonl(pair)))[0]) == "9<|end|>"


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
    with pytest.raises(UserError, match=r":2: the chat template renders message 1 differently"):
        load(tokenizer, file(path))
    assert learned(tokenizer, load(tokenizer, file(jsonl(single)))[0]) == "b<|end|>"


TWO_TURNS = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nso b\n</think>\n\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "<think>\nso d\n</think>\n\nd"},
        ]
    }
)


def test_the_last_turn_alone_is_learned(tokenizer, jsonl):
    """What earlier turns look like does not matter then, as in Qwen3's template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = QWEN3
    path = file(jsonl(TWO_TURNS))
    with pytest.raises(UserError, match=r"message 1 differently .*\(data\.learned_turns\)"):
        load(tokenizer, path)
    sequence = load(tokenizer, path, learned_turns="last")[0]
    assert learned(tokenizer, sequence) == "<think>\nso d\n</think>\n\nd<|end|>"
    text = "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"
    assert tokenizer.decode(sequence.token_ids).startswith(text + "<think>")


def test_variables_and_files_of_templates(tokenizer, jsonl, tmp_path):
    """enable_thinking: false puts the empty place into the prompt: it is not learned."""
    tokenizer = copy.deepcopy(tokenizer)
    place = tmp_path / "qwen3.jinja"
    place.write_text(QWEN3)
    single = file(jsonl(json.dumps({"prompt": "a", "response": "b"})))
    for variables, expected in (
        ({}, "<think>\n\n</think>\n\nb<|end|>"),
        ({"enable_thinking": True}, "<think>\n\n</think>\n\nb<|end|>"),
        ({"enable_thinking": False}, "b<|end|>"),
    ):
        fields = {"chat_template": str(place), "chat_template_kwargs": variables}
        own = copy.deepcopy(tokenizer)
        apply_format(own, PromptFormat(**fields))
        assert learned(own, load(own, single, **fields)[0]) == expected
    with pytest.raises(UserError, match="reads no variable 'thinking_mode'"):
        apply_format(tokenizer, PromptFormat(chat_template_kwargs={"thinking_mode": True}))
    with pytest.raises(UserError, match=r"data\.format\.chat_template: cannot read .*none\.jinja"):
        apply_format(tokenizer, PromptFormat(chat_template=str(tmp_path / "none.jinja")))


def test_reasoning_where_the_prompt_opens_it(tokenizer, jsonl):
    """The learned tokens are what the policy would sample after the rollout's prompt."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = OPENS
    row = {"prompt": "a", "response": "<think>\nso b\n</think>\n\nb"}
    sequence = load(tokenizer, file(jsonl(json.dumps(row))))[0]
    assert learned(tokenizer, sequence) == "so b\n</think>\n\nb<|end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    assert sequence.token_ids[: len(prompt)].tolist() == prompt
    with pytest.raises(UserError, match=r"writes '<think>\\n' where message 1 is to be generated"):
        load(tokenizer, file(jsonl(json.dumps({"prompt": "a", "response": "b"}))))
    forgets = copy.deepcopy(tokenizer)
    forgets.chat_template = OPENS.replace("<|assistant|><think>\n", "<|assistant|>")
    with pytest.raises(UserError, match="leaves out what stands before </think>"):
        load(forgets, file(jsonl(json.dumps(row))))


def test_an_answer_that_begins_with_a_line_break(jsonl):
    """One token spans the end of the prompt and the answer's beginning: sampled, there are two."""
    merges = [("\n", "\n")]
    vocabulary = {text: i for i, text in enumerate(["<|end|>", *"abuser:\n", "\n\n"])}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':\n' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:\n' }}{% endif %}"
    )
    sequence = load(tokenizer, file(jsonl(json.dumps({"prompt": "u", "response": "\n\nab"}))))[0]
    tokens = tokenizer.convert_ids_to_tokens(sequence.token_ids.tolist())
    assert tokens == ["u", ":", "\n", "u", "<|end|>", "a", ":", "\n", "\n\n", "a", "b", "<|end|>"]
    assert sequence.loss_mask.tolist() == [0] * 8 + [1] * 4


def weighted(answer, question=1):
    user = {"role": "user", "content": "a", "weight": question}
    return json.dumps({"messages": [user, {"role": "assistant", "content": "b", "weight": answer}]})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"prompt": "a"}', [":1:", "'response'"]),
        ('{"body": "a"}', [":1:", "messages", "prompt"]),
        ('{"prompt": "a", "response": ""}', [":1:", "'response'", "empty"]),
        ('{"messages": [], "prompt": "a", "response": "b"}', [":1:", "prompt_response and messages"]),
        ('{"messages": [], "prompt": "a"}', [":1:", "'messages'", "not empty"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', [":1:", "assistant"]),
        ('{"messages": [{"role": "user", "content": 1}]}', [":1:", "messages[0].content"]),
        ('{"prompt": "a" "response"}', [":1:", "malformed JSON"]),
        (weighted(0.5), [":1:", "messages[1].weight must be 0 (not learned) or 1 (got 0.5)"]),
        (weighted(True), [":1:", "messages[1].weight must be 0 (not learned) or 1 (got true)"]),
        (weighted("0"), [":1:", 'messages[1].weight must be 0 (not learned) or 1 (got "0")']),
        (
            weighted(0, 0),
            [":1:", "messages[0].weight: only the assistant's messages are learned (got 'user')"],
        ),
        (weighted(0), [":1:", "nothing to learn: the weight of the assistant's messages is 0"]),
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
    [line] = data_violations(SftDataConfig(train=gym(size=50, seed=1), held_out=gym(size=10, seed=40)))
    assert line.startswith("data.held_out.seed: 10 problems")
    assert line.endswith("use a seed >= 51 (got 40)")
    with pytest.raises(UserError, match="data.held_out: missing"):
        load(tokenizer, file(path), split="held_out")
    [line] = data_violations(SftDataConfig(train=file(path), held_out=file(path)))
    assert "data.held_out.path" in line
    with pytest.raises(UserError, match="data.train.path: no file"):
        load(tokenizer, file(path + "x"))


TOOLS = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '(' + (c.function | tojson) + ')' }}{% endfor %}{{ '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TALK = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "It is 3", "tool_calls": None},
    {"role": "user", "content": "+ 4?"},
    {"role": "assistant", "content": "7"},
]


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_learned_as_the_template_s_own_markers_say(tokenizer, jsonl, as_text):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TOOLS
    tools = [{"type": "function", "function": {"name": "add", "description": "sum", "parameters": {}}}]
    record = {"messages": TALK, "tools": tools}
    if as_text:  # as columnar files keep nested lists
        record = {name: json.dumps(value) for name, value in record.items()}
    sequence = load(tokenizer, file(jsonl(json.dumps(record))))[0]
    messages = [{k: v for k, v in {"content": "", **m}.items() if v is not None} for m in TALK]
    messages[1]["content"] = ""
    theirs = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sequence.token_ids.tolist() == theirs["input_ids"]
    assert sequence.loss_mask.tolist() == theirs["assistant_masks"]
    assert sum(sequence.loss_mask) > 20


def test_tools_that_the_template_would_leave_out_are_refused(tokenizer, jsonl):
    path = jsonl(json.dumps({"messages": TALK}))
    with pytest.raises(UserError, match=r":1: the chat template does not support tool_calls"):
        load(tokenizer, file(path))
    path = jsonl(json.dumps({"messages": TALK[4:], "tools": [{"type": "function"}]}))
    with pytest.raises(UserError, match=r":1: the chat template does not support tools"):
        load(tokenizer, file(path))
    path = jsonl(json.dumps({"messages": [{**TALK[0], "tool_calls": [CALL]}, TALK[5]]}))
    with pytest.raises(UserError, match="only the assistant calls tools"):
        load(tokenizer, file(path))


def with_tools(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TOOLS
    return tokenizer


def calling(arguments, **call):
    function = {"name": "add", "arguments": arguments, **call}
    return [TALK[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def test_arguments_as_json_text_are_the_object_they_say(tokenizer, jsonl):
    """OpenAI's API writes them so; a template with tojson would put them in quotes."""
    objects = jsonl(json.dumps({"messages": calling({"a": 1, "b": None})}))
    texts = jsonl(json.dumps({"messages": calling('{"a": 1, "b": null}')}))
    [one], [other] = (list(load(with_tools(tokenizer), file(path))) for path in (objects, texts))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert '"b": null' in tokenizer.decode(one.token_ids), "a null of the file's own stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a = 1", r":1: messages\[1\].tool_calls\[0\].function.arguments is not valid JSON"),
        ("[1, 2]", r":1: messages\[1\].tool_calls\[0\].function.arguments must be an object, found list"),
        (3, r":1: messages\[1\].tool_calls\[0\].function.arguments must be an object, found int"),
    ],
)
def test_arguments_that_are_no_object_are_a_row_error(tokenizer, jsonl, arguments, message):
    with pytest.raises(UserError, match=message):
        load(with_tools(tokenizer), file(jsonl(json.dumps({"messages": calling(arguments)}))))


def test_calls_of_different_tools_in_parquet_are_those_of_jsonl(tokenizer, jsonl, tmp_path):
    """Arrow gives every struct of a column every key, null where a row has none."""
    rows = [{"messages": calling({"city": "Rome"})}, {"messages": calling({"days": 3})}]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    lines = jsonl(*map(json.dumps, rows))
    sources = SftJsonlSource(source="file", path=str(path)), file(lines)
    found = [list(load(with_tools(tokenizer), source)) for source in sources]
    assert [s.token_ids.tolist() for s in found[0]] == [s.token_ids.tolist() for s in found[1]]
    assert "null" not in tokenizer.decode(found[0][0].token_ids)


def test_reasoning_that_the_template_would_leave_out_is_refused(tokenizer, jsonl):
    path = jsonl(json.dumps({"messages": [TALK[0], {**TALK[5], "reasoning_content": "4 and 3"}]}))
    with pytest.raises(UserError, match=r":1: the chat template does not support reasoning_content"):
        load(tokenizer, file(path))


def test_raw_text_is_learned_whole_and_every_token_is_predicted_once(tokenizer, jsonl):
    text = "".join(str(i % 10) for i in range(95))
    path = jsonl(json.dumps({"text": text}), json.dumps({"text": "12"}))
    demonstrations = load(tokenizer, file(path), limit=20)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    chunks = demonstrations[:-1]
    predicted = [token for s in chunks for token, mask in zip(s.token_ids, s.loss_mask, strict=True) if mask]
    assert predicted == whole[1:]
    assert all(len(s.token_ids) <= 20 for s in chunks)
    assert all(a.token_ids[-1] == b.token_ids[0] for a, b in itertools.pairwise(chunks))
    assert learned(tokenizer, demonstrations[-1]) == "2<|end|>"
    lines = demonstrations.reports[0].lines()
    assert lines == [
        "data.train: 1 of 2 rows cut into chunks of the longest sequence:",
        f"  {path}:1: {len(whole)} tokens, {len(chunks)} chunks",
    ]
    with pytest.raises(UserError, match="data.format.prompt_suffix does not apply"):
        load(tokenizer, file(path), prompt_suffix="!")


def test_columns_can_have_any_name(tokenizer, jsonl):
    """Each key of SftColumns: the column it names is read, and the usual name beside it is not."""
    other = {"role": "user", "content": "no"}, {"role": "assistant", "content": "wrong"}
    calls = [*calling({"a": 1}), {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]
    rows = {
        "messages": (
            {"messages": TALK[4:6]},
            {"talk": TALK[4:6], "messages": other},
            {"messages_field": "talk"},
        ),
        "pair": (
            {"prompt": "1 + 1 =", "response": "2"},
            {"q": "1 + 1 =", "a": "2", "prompt": "x", "response": "y"},
            {"prompt_field": "q", "response_field": "a"},
        ),
        "text": ({"text": "abc"}, {"body": "abc", "text": "x"}, {"text_field": "body"}),
        "tools": (
            {"messages": calls, "tools": [{"name": "add"}]},
            {"messages": calls, "functions": [{"name": "add"}], "tools": []},
            {"tools_field": "functions"},
        ),
    }
    for name, (usual, renamed, fields) in rows.items():
        reader = with_tools(tokenizer) if name == "tools" else tokenizer
        [expected] = load(reader, file(jsonl(json.dumps(usual))))
        path = jsonl(json.dumps(renamed), name="renamed.jsonl")
        source = SftJsonlSource(source="jsonl", path=path, **fields)
        [found] = load(reader, source)
        assert found.token_ids.tolist() == expected.token_ids.tolist(), name
        [unnamed] = load(reader, file(jsonl(json.dumps(renamed)))) if name != "tools" else [None]
        assert unnamed is None or unnamed.token_ids.tolist() != expected.token_ids.tolist(), name
