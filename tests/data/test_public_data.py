"""The shipped configurations of public data sets read rows of those sets' schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import load_config
from megarl.jobs import JOBS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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


@pytest.mark.parametrize(
    ("name", "rows", "held_out", "expected"),
    [
        ("sft_capybara", CAPYBARA, CAPYBARA, "2"),
        ("dpo_ultrafeedback", ULTRAFEEDBACK, ULTRAFEEDBACK, "5"),
        ("grpo_deepscaler", DEEPSCALER, AIME, "\\frac{5}{6}"),
        ("grpo_tools", DEEPSCALER, None, "\\frac{5}{6}"),
        ("grpo_gsm8k", GSM8K, GSM8K, "5"),
    ],
)
def test_rows_of_the_schema_are_read(
    name: str, rows: list[Any], held_out: list[Any] | None, expected: str, tokenizer: Any, tmp_path: Path
) -> None:
    overrides = ["model.path=m"]
    for split, content in (("train", rows), ("held_out", held_out)):
        if content is not None:
            folder = tmp_path / split
            folder.mkdir()
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
            overrides += location(name, split, folder / "rows.jsonl")
    job = next(job for job in JOBS.values() if name.startswith(job.name))
    config = load_config(job.root(), CONFIGS / f"{name}.yaml", overrides, check_files=False)
    for split, content in (("train", rows), ("held_out", held_out)):
        if content is not None:
            data = job.data.loader()(config, tokenizer, 32_768, split)
            assert len(data) == 1
            if split == "train":
                assert answer_of(data[0], tokenizer) == expected


def location(name: str, split: str, file: Path) -> list[str]:
    """Overrides that put a local file in the place of the hub's data set."""
    if name == "grpo_gsm8k" or (name == "grpo_deepscaler" and split == "held_out"):
        return [f"data.{split}.directory={file}"]
    return [f"data.{split}.dataset={file.parent}", f"data.{split}.split=train"]


def answer_of(example: Any, tokenizer: Any) -> str:
    """What is learned last, or the reference answer."""
    if hasattr(example, "metadata"):
        return str(example.metadata["answer"])
    sequence = getattr(example, "chosen", example)
    learned = [int(t) for t, m in zip(sequence.token_ids, sequence.loss_mask, strict=True) if m]
    turns = tokenizer.decode(learned).replace(tokenizer.eos_token, "\n").split("\n")
    return [turn.strip() for turn in turns if turn.strip()][-1]
