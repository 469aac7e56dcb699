"""Rows of the schemas of the public data sets that shipped configurations name, and where to put them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CAPYBARA = [{"source": "Airoboros", "messages": chat("Hi", "Hello.", "1 + 1?", "2"), "num_turns": 2}]
ULTRAFEEDBACK = [
    {
        "chosen": chat("2 + 3?", "5"),
        "rejected": chat("2 + 3?", "6"),
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }
]
DEEPSCALER = [{"problem": "What is 1/2 + 1/3?", "answer": "\\frac{5}{6}", "solution": "Add."}]
GSM8K = [{"question": "Two and three?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}]
AIME = [{"id": 60, "problem": "Find 200 + 4.", "solution": "Add.", "answer": "204", "year": "2024"}]
TULU = [{"id": "a", "messages": chat("1 + 2?", "3"), "source": "ai2-adapt-dev/x"}]

# Configuration: rows for training, rows held out.
ROWS: dict[str, tuple[list[Any], list[Any] | None]] = {
    "sft_capybara": (CAPYBARA, CAPYBARA),
    "sft_tulu3": (TULU, TULU),
    "dpo_ultrafeedback": (ULTRAFEEDBACK, ULTRAFEEDBACK),
    "grpo_deepscaler": (DEEPSCALER, AIME),
    "grpo_tools": (DEEPSCALER, None),
    "grpo_gsm8k": (GSM8K, GSM8K),
}


def stand_in(name: str, folder: Path) -> list[str]:
    """Write the configuration's rows below ``folder``; the overrides that take them for the hub's."""
    overrides = []
    for split, rows in zip(("train", "held_out"), ROWS[name], strict=True):
        if rows is not None:
            file = folder / split / "rows.jsonl"
            file.parent.mkdir(parents=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            overrides += location(name, split, file)
    return overrides


def location(name: str, split: str, file: Path) -> list[str]:
    """Overrides that put a local file in the place of the hub's data set."""
    if name == "grpo_gsm8k" or (name == "grpo_deepscaler" and split == "held_out"):
        return [f"data.{split}.directory={file}"]
    return [f"data.{split}.dataset={file.parent}", f"data.{split}.split=train"]
