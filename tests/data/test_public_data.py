"""The shipped configurations of public data sets read rows of those sets' schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import load_config
from megarl.jobs import JOBS
from tests.data.public_rows import ROWS, stand_in

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sft_capybara", "2"),
        ("sft_tulu3", "3"),
        ("dpo_ultrafeedback", "5"),
        ("grpo_deepscaler", "\\frac{5}{6}"),
        ("grpo_tools", "\\frac{5}{6}"),
        ("grpo_gsm8k", "5"),
    ],
)
def test_rows_of_the_schema_are_read(name: str, expected: str, tokenizer: Any, tmp_path: Path) -> None:
    overrides = ["model.path=m", *stand_in(name, tmp_path)]
    job = next(job for job in JOBS.values() if name.startswith(job.name))
    config = load_config(job.root(), CONFIGS / f"{name}.yaml", overrides, check_files=False)
    for split, content in zip(("train", "held_out"), ROWS[name], strict=True):
        if content is not None:
            data = job.data.loader()(config, tokenizer, 32_768, split)
            assert len(data) == 1
            if split == "train":
                assert answer_of(data[0], tokenizer) == expected


def answer_of(example: Any, tokenizer: Any) -> str:
    """What is learned last, or the reference answer."""
    if hasattr(example, "metadata"):
        return str(example.metadata["answer"])
    sequence = getattr(example, "chosen", example)
    learned = [int(t) for t, m in zip(sequence.token_ids, sequence.loss_mask, strict=True) if m]
    turns = tokenizer.decode(learned).replace(tokenizer.eos_token, "\n").split("\n")
    return [turn.strip() for turn in turns if turn.strip()][-1]
