"""Names that lead nowhere are found before anything starts, also by --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from megarl.config.grpo import GrpoConfig
from megarl.errors import UserError
from megarl.loops.lookups import check_names

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 4}
ROWS = {"source": "jsonl", "path": "unused"}
CUSTOM = {"path": "tests.environments.broken:Echo"}


def make_config(
    train: dict[str, Any], held_out: dict[str, Any] | None = None, **algorithm: Any
) -> GrpoConfig:
    return GrpoConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": "unused"},
            "optimizer": {"lr": 1e-3},
            "data": {"train": train, "held_out": held_out},
            "algorithm": algorithm,
            "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_new_tokens": 8},
            "training": {"num_steps": 2},
        }
    )


@pytest.mark.parametrize(
    ("train", "algorithm", "words"),
    [
        (
            GYM | {"task": "chain_sun"},
            {},
            r"data\.train\.task: reasoning-gym has no task 'chain_sun'; did you",
        ),
        (
            GYM | {"arguments": {"max_term": 2}},
            {},
            r"data\.train\.arguments\.max_term: task chain_sum has no",
        ),
        (GYM | {"arguments": {"min_terms": 9, "max_terms": 2}}, {}, r"data\.train\.arguments.*refuses it"),
        (
            {"source": "mixture", "sources": {"a": GYM, "b": GYM | {"task": "b", "seed": 99}}},
            {},
            r"data\.train\.sources\.b\.task: reasoning-gym has no task 'b'",
        ),
        (
            GYM | {"task": "rotate_matrix", "arguments": {"max_n": 3}, "curriculum": {}},
            {},
            r"data\.train\.arguments\.max_n: set by the curriculum",
        ),
        (
            ROWS | {"environment": {"path": "tests.environments.broken:Nothing"}},
            {},
            r"data\.train\.environment\.path: tests\.environments\.broken has no Nothing",
        ),
        (
            ROWS | {"environment": {"kind": "function", "paths": ["no.such:thing"]}},
            {},
            r"data\.train\.environment\.paths: cannot import no\.such",
        ),
        (GYM, {"loss": "tests.losses.own:nothing"}, r"algorithm\.loss: tests\.losses\.own has no nothing"),
        (
            GYM,
            {"advantage": "json:decoder"},
            r"algorithm\.advantage: json:decoder is a module, not a function",
        ),
    ],
)
def test_a_name_that_is_not_there(train: dict[str, Any], algorithm: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_names(make_config(train, **algorithm), here=False)
    assert "\n" not in str(caught.value)


def test_all_of_them_are_told_at_once() -> None:
    config = make_config(GYM | {"task": "x"}, ROWS | {"environment": {"path": "no.such:Thing"}})
    with pytest.raises(UserError) as caught:
        check_names(config, here=False)
    first, second = str(caught.value).splitlines()
    assert first.startswith("data.train.task:") and second.startswith("data.held_out.environment.path:")


def test_what_is_there_is_found() -> None:
    check_names(make_config(GYM, ROWS | {"environment": CUSTOM}), here=True)


def test_a_variable_is_needed_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"kind": "judge", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_variable": "NO_KEY"}
    config = make_config(ROWS | {"environment": judge})
    monkeypatch.delenv("NO_KEY", raising=False)
    check_names(config, here=False)
    with pytest.raises(UserError, match=r"data\.train\.environment\.api_key_variable: NO_KEY is not set"):
        check_names(config, here=True)
    monkeypatch.setenv("NO_KEY", "x")
    check_names(config, here=True)


def test_a_dry_run_looks_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megarl.config.load.find_file_violations", lambda config, weights: [])
    monkeypatch.setattr("megarl.models.layout_checks.check_training", lambda config: None)
    monkeypatch.setattr("megarl.loops.dry_run.dry_run", lambda job, config, problems: print("read"))
    command = ["grpo", "--config", "configs/quickstart_grpo.yaml", "--dry-run", f"run.dir={tmp_path}/run"]
    assert main([*command]) == 0
    assert capsys.readouterr().out == "read\n"
    assert main([*command, "data.train.task=nonsense"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "data.train.task: reasoning-gym has no task 'nonsense'" in told.err
    assert len(told.err.splitlines()) <= 2
    assert not (tmp_path / "run").exists()
