"""`megarl init`: what it writes is a configuration of its job, with a comment on each setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl import init
from megarl.cli import main
from megarl.config.load import load_config
from megarl.jobs import JOBS, PAIRS, PROBLEMS
from tests import test_cli

MODEL = {**test_cli.MODEL, "max_position_embeddings": 512}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "_has_gpu", lambda: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    for name in ("tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    rows = {
        "sft.jsonl": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "pairs.jsonl": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "problems.jsonl": {"question": "1 + 1", "solution": "2"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text((json.dumps(row) + "\n") * 40)
    return tmp_path


def data_of(job: str) -> str:
    kind = JOBS[job].data
    return "problems.jsonl" if kind is PROBLEMS else "pairs.jsonl" if kind is PAIRS else "sft.jsonl"


@pytest.mark.parametrize("job", JOBS)
def test_it_writes_a_configuration_of_the_job(job: str, folder: Path, capsys: Any) -> None:
    flags = [job, "--model", "model", "--data", data_of(job), "--out", "mine.yaml"]
    assert main(["init", *flags, *(["--teacher", "model"] if job == "distill" else [])]) == 0
    assert f"wrote mine.yaml; next: megarl {job} mine.yaml --dry-run" in capsys.readouterr().out
    config = load_config(JOBS[job].root(), "mine.yaml")
    assert (config.run.dir, config.model.path) == ("runs/mine", "model")
    split = config.data.train if JOBS[job].trains else config.data.held_out
    assert split.path == data_of(job)
    if JOBS[job].data is PROBLEMS:
        assert (split.prompt_field, split.answer_field) == ("question", "solution")
    if job == "sft":  # three epochs of 40 rows
        assert config.with_steps(40).training.num_steps == 8 and config.training.batch_size == 16
    text = (folder / "mine.yaml").read_text()
    settings = [line for line in text.splitlines() if re.match(r"\s+\w+: \S", line)]
    assert sum("  # " in line for line in settings) >= len(settings) - 1
    assert main([job, "mine.yaml", "--dry-run=full"]) == 0


def test_generated_problems_and_what_is_refused(folder: Path, capsys: Any) -> None:
    flags = ["init", "grpo", "--model", "model"]
    assert main([*flags, "--data", "chain_sum"]) == 0
    written = yaml.safe_load((folder / "grpo.yaml").read_text())
    assert written["data"]["train"] == {"source": "reasoning_gym", "task": "chain_sum", "size": 1000}
    assert main([*flags, "--data", "chain_sum"]) == 2
    assert "--out: grpo.yaml exists already" in capsys.readouterr().err
    for more, message in (
        (["--data", "no/such/file.txt"], "--data: no such file, and neither an id of the hub"),
        (["--data", "none.jsonl"], "data.train.path: no such file"),
        (["--data", "chain_sum", "--teacher", "model"], "--teacher: megarl grpo has none"),
    ):
        assert main([*flags, *more, "--out", "other.yaml"]) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "other.yaml").exists()
    assert main(["init", "grpo"]) == 2
    assert "--model, --data required without a terminal" in capsys.readouterr().err


def test_it_asks_at_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    replies = iter(["gropo", "dpo", "", "model", "pairs.jsonl", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _prompt: next(replies))
    assert main(["init"]) == 0
    assert "one of sft, dpo" in capsys.readouterr().out
    assert load_config(JOBS["dpo"].root(), "dpo.yaml").data.train.path == "pairs.jsonl"
