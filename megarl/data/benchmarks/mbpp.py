"""MBPP (Austin et al. 2021, arXiv:2108.07732), full or sanitized: a task, and assertions that must pass."""

from __future__ import annotations

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, Row, code_question, text_of


def _question(row: Row, index: int) -> Question:
    cases = row.get("test_list")
    if not isinstance(cases, list) or not cases:
        raise BadRow("column 'test_list' must be a list of assertions and not empty")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    task = text_of(row, "text", "prompt")  # names in the full and the sanitized set
    text = f"{task}\n\nYour code must pass:\n\n```python\n{chr(10).join(cases)}\n```\n\n"
    text += "Answer with Python code in one code block."
    return code_question(text, "\n".join([setup, *cases]).strip() + "\n", row.get("code"))


BENCHMARK = Benchmark("google-research-datasets/mbpp", "full", "test", _question)
