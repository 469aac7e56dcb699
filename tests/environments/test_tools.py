"""Tools and their loop: forms of calls, read from chat templates, results, wrong calls."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import pytest

from megarl.config.environments import ToolsConfig
from megarl.environments import make_environment, sandbox
from megarl.environments.tool_format import ToolFormat
from megarl.environments.tools import (
    Calculator,
    PythonTool,
    Search,
    ToolError,
    make_tools,
    schemas,
    words_of,
)
from megarl.errors import UserError
from megarl.records import Prompt

# In the manner of Qwen, of Llama 3, of Mistral, and of a model without tools.
HERMES = (
    "{% if tools %}<|s|>Tools: {{ tools | tojson }}<|e|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|e|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = (
    "{% if tools %}Tools: {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'  # noqa: E501
    "{% else %}{{ m.content }}{% endif %}<|e|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
)
MISTRAL = (
    "{% if tools %}[T]{{ tools | tojson }}[/T]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{% endfor %}]</s>{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}"  # noqa: E501
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|e|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
TOOLS = schemas(["calculator", "python"])


def render(template: str) -> Any:
    return lambda messages, **options: (
        jinja2.Environment().from_string(template).render(messages=messages, **options)
    )


@pytest.mark.parametrize(
    ("template", "expected", "turn"),
    [
        (HERMES, ("<tool_call>", "name", "arguments", True), "hm\n<tool_call>\n{}\n</tool_call>"),
        (LLAMA, ("", "name", "parameters", True), "{}"),
        (MISTRAL, ("[TOOL_CALLS]", "name", "arguments", True), "[TOOL_CALLS][{}]"),
        (PLAIN, ("<tool_call>", "name", "arguments", False), "<tool_call>{}"),
    ],
)
def test_a_template_tells_how_calls_are_written(template: str, expected: tuple[Any, ...], turn: str):
    form = ToolFormat.of(render(template), TOOLS)
    assert (form.marker, form.name_key, form.arguments_key, form.native) == expected
    assert ToolFormat(**form.as_dict()) == form
    call = json.dumps({form.name_key: "calculator", form.arguments_key: {"expression": "{1}"}})
    assert form.call_in(turn.replace("{}", call)) == ("calculator", {"expression": "{1}"})
    assert form.call_in("The answer is 4.") is None
    assert isinstance(form.call_in(turn.replace("{}", '{"name": "x", ')), str)
    assert isinstance(form.call_in(turn.replace("{}", '{"nome": "x"}')), str)


def test_a_form_that_is_no_json_is_refused():
    template = HERMES.replace('{"name": "{{ c.function.name }}", ', "<f={{ c.function.name }}>{")
    with pytest.raises(UserError, match="has an unknown format of tool calls"):
        ToolFormat.of(render(template), TOOLS)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(3 + 4) * 12", "84"),
        ("2 ^ 10", "1024"),
        ("7 / 2", "3.5"),
        ("-7 // 2", "-4"),
        ("1e3", "1000"),
        ("2**-1", "0.5"),
    ],
)
def test_calculator(expression: str, result: str):
    assert Calculator().run({"expression": expression}) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "x + 1",
        "1 / 0",
        "9 ** 9 ** 9",
        "(-8) ** 0.5",
        "1 +",
        "'a' * 3",
        "",
        "1" * 600 + "* 1" * 0 + "**2",
        "-" * 20_000 + "1",
        "(" * 5_000 + "1" + ")" * 5_000,
        "1 + \ud83d",
        "1 \0",
        "1" * 5_000,
    ],
)
def test_calculator_refuses(expression: str):
    with pytest.raises(ToolError):
        Calculator().run({"expression": expression})


def okapi(query: str, documents: list[str]) -> list[float]:
    """BM25: k1 1.5, b 0.75, idf log((N - n + 0.5) / (n + 0.5)), negative ones a quarter of the mean."""
    split = [words_of(document) for document in documents]
    mean = sum(map(len, split)) / len(split)
    vocabulary = {word for words in split for word in words}
    idf = {}
    for word in vocabulary:
        n = sum(word in words for words in split)
        idf[word] = math.log(len(split) - n + 0.5) - math.log(n + 0.5)
    floor = 0.25 * sum(idf.values()) / len(idf)
    idf = {word: value if value >= 0 else floor for word, value in idf.items()}
    return [
        sum(
            idf.get(w, 0) * words.count(w) * 2.5 / (words.count(w) + 1.5 * (0.25 + 0.75 * len(words) / mean))
            for w in set(words_of(query))
        )
        for words in split
    ]


def test_search_orders_as_the_formula_does(tmp_path: Path):
    texts = [
        "The cat sat on the mat.",
        "A dog and a cat.",
        "Nothing of the sort.",
        "cat cat cat",
        "Dogs bark at night.",
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    search = Search(str(path), 5, "f")
    for query in ("cat", "the dog", "CAT on a mat", "night"):
        scores = okapi(query, texts)
        order = sorted(range(5), key=lambda i: (-scores[i], i))
        found = [int(line.split("]")[0][1:]) - 1 for line in search.run({"query": query}).split("\n\n")]
        shared = [i for i in order if set(words_of(query)) & set(words_of(texts[i]))]
        assert found == shared, query
    assert search.run({"query": "zebra"}) == "nothing found"
    path.write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(UserError, match=r"f: .*d.jsonl:2: not"):
        Search(str(path), 5, "f")


def play(environment: Any, answer: str, *turns: str, **metadata: Any) -> list[Any]:
    async def episode() -> list[Any]:
        await environment.reset(Prompt(0, "p", [1], {"answer": answer, **metadata}))
        return [await environment.step(turn) for turn in turns]

    return asyncio.run(episode())


def test_the_loop_of_calls_and_an_answer():
    config = ToolsConfig(kind="tools", tools=["calculator"], error_penalty=0.1)
    environment = make_environment(config, "e")
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    results = play(environment, "42", call, call.replace("calculator", "oracle"), "<tool_call>{", "It is 42.")
    assert [result.done for result in results] == [False, False, False, True]
    assert [result.reward for result in results] == [0.0, -0.1, -0.1, 1.0]
    assert results[0].observation.text == "42"
    assert results[0].observation.role == "tool"
    assert results[1].observation.text == "Error: no tool 'oracle'; there are calculator"
    assert results[3].info["tool_calls"] == 3
    assert results[3].info["tool_errors"] == 2
    assert play(environment, "42", "It is 41.")[0].reward == 0.0
    llama = ToolFormat("", "name", "parameters", True).as_dict()
    [result] = play(
        environment, "42", '{"name": "calculator", "parameters": {"expression": "1+1"}}', tool_format=llama
    )
    assert result.observation.text == "2"


def test_python_tool():
    try:
        sandbox.choose()
    except UserError as error:
        pytest.skip(str(error))
    tool = PythonTool(5.0, "f")
    assert tool.run({"code": "print(sum(range(10)))"}) == "45"
    assert tool.run({"code": "print(1)\n1 / 0"}) == "1\n\nZeroDivisionError: division by zero"
    assert tool.run({"code": "x = 1"}) == "(nothing printed)"
    with pytest.raises(ToolError, match="'code' must be text"):
        tool.run({})


def test_as_many_documents_of_the_corpus_as_asked_for(tmp_path: Path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"cat number {i}"}) + "\n" for i in range(6)))
    for count in (1, 4):
        config = ToolsConfig(kind="tools", tools=["search"], corpus=str(path), num_results=count)
        [search] = make_tools(config, "environment")
        assert search.run({"query": "cat"}).count("cat number") == count


def test_a_program_of_the_python_tool_has_its_own_time():
    try:
        sandbox.choose()
    except UserError as error:
        pytest.skip(str(error))
    call = {"code": "import time\ntime.sleep(1)\nprint('done')"}
    for seconds, result in ((0.3, "(ended: timeout)"), (30.0, "done")):
        config = ToolsConfig(kind="tools", tools=["python"], python_timeout_seconds=seconds)
        [tool] = make_tools(config, "environment")
        assert tool.run(call) == result
