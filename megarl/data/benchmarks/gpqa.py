"""GPQA (Rein et al. 2023, arXiv:2311.12022): one correct and three wrong answers, shuffled by row number."""

from __future__ import annotations

import random

from megarl.data.benchmarks.base import Benchmark, Question, Row, choice_question, text_of


def _question(row: Row, index: int) -> Question:
    options = [text_of(row, "Correct Answer")]
    options += [text_of(row, f"Incorrect Answer {number}") for number in (1, 2, 3)]
    order = list(range(4))
    random.Random(index).shuffle(order)
    category = text_of(row, "High-level domain")
    return choice_question(text_of(row, "Question"), [options[i] for i in order], order.index(0), category)


BENCHMARK = Benchmark("Idavidrein/gpqa", "gpqa_diamond", "train", _question)
