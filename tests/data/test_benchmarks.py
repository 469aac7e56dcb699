"""Benchmarks read from small local copies in their hub layouts, written here as parquet or JSONL."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.config.benchmarks import BenchmarkSource
from megarl.config.data import EvalDataConfig
from megarl.data.benchmarks import Question, load_questions
from megarl.data.prompts import load_prompts
from megarl.environments import grade, make
from megarl.errors import UserError

GSM8K = {"question": "Two and forty?", "answer": "2 + 1,040 = <<2+1040=1042>>1042\n#### 1,042"}
MATH = {
    "problem": "Half of one?",
    "solution": "It is $\\frac12$.",
    "answer": "\\frac{1}{2}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
AIME_2024 = {"ID": "2024-I-1", "Problem": "What?", "Solution": "This.", "Answer": 33}
AIME_2025 = {"problem": "What now?", "answer": "070", "id": "0"}
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "High-level domain": "Physics",
    "Subdomain": "Optics",
    "Record ID": "rec1",
}
MMLU = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
MMLU_PRO = {
    "question_id": 1,
    "question": "Which?",
    "options": [f"option {i}" for i in range(10)],
    "answer": "J",
    "answer_index": 9,
    "cot_content": "",
    "category": "law",
    "src": "x",
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "x",
    "task_id": 11,
    "prompt": "Write a function to double.",
    "code": "def double(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4"],
}


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def load(tmp_path: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> list[Question]:
    """Load the rows through one JSONL file."""
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = BenchmarkSource(source="benchmark", name=name, directory=str(file), **fields)
    return load_questions(source, "data.held_out")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_gsm8k_in_the_hubs_folders(tmp_path: Path) -> None:
    """main/test-*.parquet beside main/train-*.parquet, as the hub lays it out."""
    parquet(tmp_path / "gsm8k/main/test-00000-of-00001.parquet", [GSM8K, GSM8K])
    parquet(tmp_path / "gsm8k/main/train-00000-of-00001.parquet", [GSM8K])
    parquet(tmp_path / "gsm8k/socratic/test-00000-of-00001.parquet", [GSM8K] * 3)
    source = BenchmarkSource(source="benchmark", name="gsm8k", directory=str(tmp_path / "gsm8k"))
    questions = load_questions(source, "data.held_out")
    assert [question.answer for question in questions] == ["1042", "1042"]
    assert "\\boxed" in questions[0].text
    train = source.model_copy(update={"split": "train"})
    assert len(load_questions(train, "data.held_out")) == 1
    socratic = source.model_copy(update={"subset": "socratic"})
    assert len(load_questions(socratic, "data.held_out")) == 3


def test_math500_keeps_latex_and_the_subject(tmp_path: Path) -> None:
    (question,) = load(tmp_path, "math500", [MATH])
    assert (question.answer, question.category) == ("\\frac{1}{2}", "Prealgebra")


def test_aime_of_both_years(tmp_path: Path) -> None:
    assert [q.answer for q in load(tmp_path, "aime", [AIME_2024])] == ["33"]
    assert [q.answer for q in load(tmp_path, "aime", [AIME_2025])] == ["70"]


def test_gpqa_shuffles_its_answers_by_row(tmp_path: Path) -> None:
    questions = load(tmp_path, "gpqa", [GPQA] * 40)
    for question in questions:
        choices = question.metadata["choices"]
        assert choices["ABCD".index(question.answer)] == "right"
        assert sorted(choices) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert f"{question.answer}. right" in question.text
    assert {question.answer for question in questions} == set("ABCD")
    assert questions == load(tmp_path, "gpqa", [GPQA] * 40)
    assert questions[0].category == "Physics"


def test_mmlu_and_mmlu_pro(tmp_path: Path) -> None:
    (mmlu,) = load(tmp_path, "mmlu", [MMLU])
    assert (mmlu.answer, mmlu.category) == ("C", "anatomy")
    assert "C. c" in mmlu.text
    assert "X is A, B, C or D" in mmlu.text
    (pro,) = load(tmp_path, "mmlu_pro", [MMLU_PRO])
    assert (pro.answer, pro.category) == ("J", "law")
    assert "J. option 9" in pro.text


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, MBPP_SANITIZED])
def test_code_tests_accept_the_reference_solution_and_no_other(tmp_path: Path, row: dict[str, Any]) -> None:
    name = "humaneval" if row is HUMANEVAL else "mbpp"
    (question,) = load(tmp_path, name, [row])
    prefix, tests = question.metadata["prefix"], question.metadata["tests"]
    solution = prefix + question.answer
    exec(solution + "\n" + tests, {})
    with pytest.raises(AssertionError):
        exec(solution.replace("2 * x", "3 * x") + "\n" + tests, {})


BAD = [
    ("gsm8k", {**GSM8K, "answer": "42"}, "column 'answer' does not end in '#### RESULT'"),
    ("math500", {"problem": "x", "level": 1}, "no column 'answer'; it has 'problem', 'level'"),
    ("aime", {**AIME_2025, "answer": "1/2"}, "an AIME answer is an integer from 0 to 999 (found '1/2')"),
    ("mmlu", {**MMLU, "answer": 4}, "answer 4 of 4 options"),
    ("mmlu_pro", {**MMLU_PRO, "answer_index": 3}, "answer J and answer_index 3 disagree"),
    ("mbpp", {**MBPP, "test_list": []}, "column 'test_list' must be a list of assertions and not empty"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_row_of_another_layout_is_named(
    tmp_path: Path, name: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, name, [row])
    assert str(error.value) == f"data.held_out: row 0 does not have the layout of {name}: {reason}"


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    source = BenchmarkSource(source="benchmark", name="gsm8k", directory=str(tmp_path / "none"))
    with pytest.raises(UserError, match="data.held_out.directory: cannot read split 'test'") as error:
        load_questions(source, "data.held_out")
    assert "\n" not in str(error.value)


def test_prompts_of_a_benchmark_are_judged_by_its_verifier(tmp_path: Path, tokenizer: Any) -> None:
    """From the file to a reward, through the same calls as `megarl eval`."""
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps(GSM8K) + "\n" + json.dumps({**GSM8K, "answer": "7\n#### 7"}) + "\n")
    source = BenchmarkSource(source="benchmark", name="gsm8k", directory=str(file))
    config = EvalDataConfig(held_out=source)
    dataset = load_prompts(config, tokenizer, max_prompt_tokens=400, split="held_out")
    assert [prompt.metadata["answer"] for prompt in dataset] == ["1042", "7"]
    assert "Two and forty?" in dataset[0].text
    assert dataset.unseen == [0, 1]
    environment = make(source, "data.held_out")
    for text, reward in (("so \\boxed{1,042}", 1.0), ("\\boxed{1043}", 0.0)):
        assert asyncio.run(grade(environment, dataset[0], text))[0] == reward


@pytest.mark.parametrize(("name", "row"), [("gpqa", GPQA), ("mmlu", MMLU), ("mmlu_pro", MMLU_PRO)])
def test_letters_are_judged(tmp_path: Path, tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    file = tmp_path / f"{name}.jsonl"
    file.write_text(json.dumps(row) + "\n")
    source = BenchmarkSource(source="benchmark", name=name, directory=str(file))
    config = EvalDataConfig(held_out=source)
    dataset = load_prompts(config, tokenizer, max_prompt_tokens=800, split="held_out")
    answer = dataset[0].metadata["answer"]
    environment = make(source, "data.held_out")
    for letter in "ABCDEFGHIJ"[: len(dataset[0].metadata["choices"])]:
        text = f"A or B? I take\nAnswer: {letter}"
        assert asyncio.run(grade(environment, dataset[0], text))[0] == float(letter == answer)


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, MBPP_SANITIZED])
def test_programs_are_judged_in_the_sandbox(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> None:
    """The reference solution, in a code block as the model is prompted to answer, and a wrong one."""
    name = "humaneval" if row is HUMANEVAL else "mbpp"
    file = tmp_path / f"{name}.jsonl"
    file.write_text(json.dumps(row) + "\n")
    source = BenchmarkSource(source="benchmark", name=name, directory=str(file))
    config = EvalDataConfig(held_out=source)
    dataset = load_prompts(config, tokenizer, max_prompt_tokens=800, split="held_out")
    solution = row["prompt"] + row["canonical_solution"] if row is HUMANEVAL else row["code"]
    environment = make(source, "data.held_out")
    for program, reward in ((solution, 1.0), (solution.replace("2 * x", "x"), 0.0)):
        text = f"Here it is:\n\n```python\n{program}\n```\n"
        assert asyncio.run(grade(environment, dataset[0], text))[0] == reward
