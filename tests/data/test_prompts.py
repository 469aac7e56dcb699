"""Prompts against HF's own chat templating, and one clear line for every user error."""

from __future__ import annotations

import json

import pytest
import reasoning_gym

from megarl.config.data import JsonlSource, PromptDataConfig, PromptFormat, PromptReasoningGymSource
from megarl.data.prompts import load_prompts
from megarl.errors import UserError
from tests.config.rules import data_violations

CHAIN = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def gym(task="chain_sum", arguments=CHAIN, size=300, seed=1) -> PromptReasoningGymSource:
    return PromptReasoningGymSource(
        source="reasoning_gym", task=task, arguments=dict(arguments), size=size, seed=seed
    )


def load(tokenizer, train, held_out=None, split="train", limit=400, **format_fields):
    config = PromptDataConfig(train=train, held_out=held_out, format=PromptFormat(**format_fields))
    return load_prompts(config, tokenizer, max_prompt_tokens=limit, split=split)


def error_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_generated_prompts_are_hf_s_chat_tokens_of_the_task_s_question(tokenizer):
    dataset = load(tokenizer, gym(), prompt_suffix=" Only the number.", system_prompt="Be brief.")
    reference = reasoning_gym.create_dataset("chain_sum", seed=1, size=300, **CHAIN)
    assert len(dataset) == 300
    for index in (0, 7, 299):
        question = reference[index]["question"]
        expected = tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": question + " Only the number."},
            ],
            add_generation_prompt=True,
            return_dict=False,
        )
        prompt = dataset[index]
        assert prompt.token_ids.tolist() == expected
        assert prompt.index == index
        assert prompt.metadata["answer"] == reference[index]["answer"]
        assert prompt.metadata["entry"]["question"] == question
        # By hand, not by the template: a special token before and one after each text.
        assert prompt.text == (
            f"<|system|>Be brief.<|end|><|user|>{question} Only the number.<|end|><|assistant|>"
        )
        assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_bare_prompts_are_the_text_itself(tokenizer):
    dataset = load(tokenizer, gym(), chat_template=False, prompt_suffix=" ")
    assert dataset[3].text == dataset[3].metadata["entry"]["question"] + " "
    assert tokenizer.decode(dataset[3].token_ids) == dataset[3].text
    assert [p.index for p in dataset[2:5]] == [2, 3, 4]
    assert dataset[-1].index == 299
    with pytest.raises(IndexError):
        dataset[300]


def test_messages_and_numbers_in_jsonl(tokenizer, jsonl):
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    path = jsonl(
        json.dumps({"q": "What is 1/2 + 1/2?", "a": 1}),
        "",
        json.dumps({"q": messages, "a": "$\\frac{8}{2}$"}),
    )
    source = JsonlSource(source="jsonl", path=path, prompt_field="q", answer_field="a")
    dataset = load(tokenizer, source, prompt_suffix=" Think.")
    assert [p.metadata["answer"] for p in dataset] == ["1", "$\\frac{8}{2}$"]
    expected = [dict(m) for m in messages]
    expected[-1]["content"] += " Think."
    assert dataset[1].token_ids.tolist() == tokenizer.apply_chat_template(
        expected, add_generation_prompt=True, return_dict=False
    )
    assert messages[-1]["content"] == "And 2 + 2?"
    assert dataset[1].metadata["entry"]["q"] == messages


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "answer": "1"}', '{"prompt": '], [":2:", "malformed JSON", "column"]),
        (['{"prompt": "a", "answer": "1"}', "[1]"], [":2:", "object", "list"]),
        (['{"prompt": "a", "answers": "1"}'], [":1:", "'answer'", "'answers'"]),
        (['{"question": "a", "answer": "1"}'], [":1:", "'prompt'", "'question'"]),
        (['{"prompt": 3, "answer": "1"}'], [":1:", "'prompt'", "string", "int"]),
        (['{"prompt": " ", "answer": "1"}'], [":1:", "'prompt'", "empty"]),
        (['{"prompt": "a", "answer": ["1"]}'], [":1:", "'answer'", "list"]),
        (['{"prompt": [], "answer": "1"}'], [":1:", "'prompt'", "messages"]),
        (['{"prompt": [{"role": "user"}], "answer": "1"}'], [":1:", "prompt[0]", "content"]),
        (['{"prompt": [{"role": "bot", "content": "a"}], "answer": "1"}'], [":1:", "prompt[0].role", "bot"]),
        (['{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}'], [":1:", "role 'user'"]),
        (['{"prompt": "a", "answer": "1"}', '{"prompt": "a", "answer": "Paris"}'], [":2:", "Paris"]),
        (['{"prompt": "a", "answer": "$\\\\frac{1$"}'], [":1:", "'answer'"]),
        ([""], ["data.train.path", "no records"]),
    ],
)
def test_bad_lines_are_named(tokenizer, jsonl, lines, words):
    message = error_of(tokenizer, JsonlSource(source="jsonl", path=jsonl(*lines)))
    for word in words:
        assert word in message


def test_bad_files_are_named(tokenizer, tmp_path):
    missing = str(tmp_path / "none.jsonl")
    assert f"data.train.path: no file {missing}" in error_of(
        tokenizer, JsonlSource(source="jsonl", path=missing)
    )
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "a", "answer": "1"}\n{"prompt": "é"}\n'.encode("latin-1"))
    assert "latin.jsonl:2: not UTF-8" in error_of(tokenizer, JsonlSource(source="jsonl", path=str(latin)))


def test_too_long_prompts_are_named_with_both_numbers(tokenizer, jsonl):
    path = jsonl('{"prompt": "1 + 1", "answer": "2"}', json.dumps({"prompt": "9" * 50, "answer": "2"}))
    message = error_of(tokenizer, JsonlSource(source="jsonl", path=path), limit=52)
    assert ":2:" in message
    assert "53 tokens" in message  # 50 digits and three template tokens
    assert "52" in message
    assert len(load(tokenizer, JsonlSource(source="jsonl", path=path), limit=53)) == 2


def test_a_long_generated_prompt_is_found_at_load_or_when_drawn(tokenizer):
    arguments = {"min_terms": 2, "max_terms": 40, "min_digits": 1, "max_digits": 30}
    source = gym(arguments=arguments, size=3000)
    dataset = load(tokenizer, source, limit=2000)
    lengths = [len(p.token_ids) for p in dataset[:256]]
    questions = list(dataset.questions())
    late = max(range(3000), key=lambda i: len(questions[i]))
    late_length = len(dataset[late].token_ids)
    assert late >= 256
    assert late_length > max(lengths)

    dataset = load(tokenizer, source, limit=max(lengths))
    with pytest.raises(UserError, match=rf"data.train: problem {late}: .* {late_length} tokens"):
        dataset[late]
    message = error_of(tokenizer, source, limit=max(lengths) - 1)
    assert f"problem {lengths.index(max(lengths))}:" in message
    assert f"{max(lengths)} tokens, but at most {max(lengths) - 1}" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (gym(task="chainsum"), ["data.train.task", "'chainsum'", "chain_sum"]),
        (gym(arguments={"max_term": 2}), ["data.train.arguments.max_term", "max_terms"]),
        (gym(arguments={"seed": 2}), ["data.train.arguments.seed", "data.train.seed"]),
        (gym(arguments={"min_terms": 3, "max_terms": 2}), ["data.train.arguments.", "max_terms"]),
        (gym(arguments={"max_digits": "two"}), ["data.train.arguments.max_digits", "'two'"]),
        (gym(arguments={"min_terms": 0}), ["data.train.arguments.min_terms", "0"]),
    ],
)
def test_bad_tasks_and_arguments_are_named(tokenizer, source, words):
    message = error_of(tokenizer, source)
    for word in words:
        assert word in message


def test_held_out_problems_must_come_from_other_streams(tokenizer):
    [message] = data_violations(PromptDataConfig(train=gym(seed=1), held_out=gym(seed=1)))
    assert "data.held_out.seed" in message
    assert "301" in message
    # Problem i + 1 of seed s is problem i of seed s + 1: seeds closer than the size are not apart.
    shifted = reasoning_gym.create_dataset("chain_sum", seed=2, size=10, **CHAIN)[0]["question"]
    assert reasoning_gym.create_dataset("chain_sum", seed=1, size=10, **CHAIN)[1]["question"] == shifted
    [message] = data_violations(PromptDataConfig(train=gym(seed=1), held_out=gym(seed=300)))
    assert "301" in message
    assert data_violations(PromptDataConfig(train=gym(seed=1), held_out=gym(seed=301))) == []
    held_out = load(tokenizer, gym(seed=1), gym(seed=301), split="held_out")
    assert (
        held_out[0].metadata["entry"]["question"]
        == (reasoning_gym.create_dataset("chain_sum", seed=301, size=1, **CHAIN)[0]["question"])
    )
    assert "data.held_out: missing" in error_of(tokenizer, gym(), split="held_out")


def test_overlap_counts_held_out_texts_among_the_training_ones(tokenizer, jsonl):
    train, held_out = gym(size=2000), gym(size=100, seed=5000)
    texts = [
        [reasoning_gym.create_dataset("chain_sum", seed=s, size=n, **CHAIN)[i]["question"] for i in range(n)]
        for s, n in ((1, 2000), (5000, 100))
    ]
    expected = sum(text in texts[0] for text in texts[1])
    assert 0 < expected < 100  # two-digit sums are few, so the test can fail either way
    assert load(tokenizer, train, held_out, split="held_out").overlap == expected
    assert load(tokenizer, train, held_out).overlap == 0

    first = jsonl(*[json.dumps({"prompt": str(i), "answer": "1"}) for i in range(10)], name="a.jsonl")
    second = jsonl(*[json.dumps({"prompt": str(i), "answer": "1"}) for i in range(7, 20)], name="b.jsonl")
    sources = [JsonlSource(source="jsonl", path=path) for path in (first, second)]
    assert load(tokenizer, *sources, split="held_out").overlap == 3
    [message] = data_violations(PromptDataConfig(train=sources[0], held_out=sources[0]))
    assert "data.held_out.path" in message


def test_too_many_training_problems_are_not_compared(tokenizer, monkeypatch):
    """By their number alone: the same run evaluates on the same problems on any machine."""
    monkeypatch.setattr("megarl.data.prompts.MAX_COMPARED_PROBLEMS", 200)
    held_out = gym(size=10, seed=5000)
    assert load(tokenizer, gym(size=200), held_out, split="held_out").unseen is not None
    larger = load(tokenizer, gym(size=201), held_out, split="held_out")
    assert larger.unseen is None and larger.overlap is None


def test_a_template_s_own_refusal_names_the_line(tokenizer, jsonl):
    path = jsonl(
        '{"prompt": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}], "answer": "1"}'
    )
    message = error_of(tokenizer, JsonlSource(source="jsonl", path=path))
    assert ":1:" in message
    assert "role tool" in message


def test_messages_without_a_template_are_refused(tokenizer, jsonl):
    path = jsonl('{"prompt": [{"role": "user", "content": "b"}], "answer": "1"}')
    source = JsonlSource(source="jsonl", path=path)
    assert "data.format.chat_template" in error_of(tokenizer, source, chat_template=False)
