"""HumanEval (Chen et al. 2021, arXiv:2107.03374): complete a function from its signature and docstring."""

from __future__ import annotations

from megarl.data.benchmarks.base import Benchmark, Question, Row, code_question, raw_text_of, text_of


def _question(row: Row, index: int) -> Question:
    prompt, name = raw_text_of(row, "prompt"), text_of(row, "entry_point")
    task = (
        "Complete this Python function. Answer with the whole function, imports included, in one code block."
    )
    tests = f"{raw_text_of(row, 'test')}\n\ncheck({name})\n"
    return code_question(
        f"{task}\n\n```python\n{prompt.rstrip()}\n```", tests, row.get("canonical_solution"), prompt
    )


BENCHMARK = Benchmark("openai/openai_humaneval", None, "test", _question)
