"""`megarl config KEY` says what the schema says."""

from __future__ import annotations

import pytest

from megarl.cli import main
from megarl.config.explain import explain
from megarl.config.introspect import describe_field, walk
from megarl.errors import UserError
from megarl.jobs import roots


def test_every_key_of_every_command_is_explained() -> None:
    for name, root in roots().items():
        for path, field in walk(root).items():
            text = "\n".join(explain(".".join(path), name))
            assert f"  type: {describe_field(field)}" in text
            assert " ".join((field.description or "").split())[:60] in text.replace("\n  ", " ")


def test_commands_that_share_a_field_share_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "optimizer.lr"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("optimizer.lr") == 1
    assert "of: megarl sft, dpo, rm, grpo, ppo, distill" in shown


def test_kinds_of_a_section_are_told_apart() -> None:
    lines = explain("data.train", "grpo")
    assert sum(line.startswith("  keys with source: ") for line in lines) >= 4


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("optimizer.lrr", "did you mean optimizer.lr"),
        ("kl_coef", "did you mean algorithm.kl_coef?"),
        ("learning_rate", "did you mean optimizer.lr?"),
        ("algorithm.clip_ratio_c", "it is called algorithm.dual_clip now"),
        ("kl_coeff", "algorithm.kl_coef"),
        ("zzzz", "zzzz: no such setting"),
    ],
)
def test_a_near_miss_is_answered(key: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        explain(key)
