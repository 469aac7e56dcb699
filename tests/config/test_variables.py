"""What variables of the environment put into a configuration is used, and written down nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.grpo import GrpoConfig
from megarl.config.load import dump_config, load_config, public
from megarl.errors import UserError
from megarl.run_directory import RunDirectory

SECRET = "sk-4f9ad1c07b6e2f38"
GRPO: dict[str, Any] = {
    "run": {"dir": "${PLACE}/run"},
    "model": {"path": "model"},
    "data": {
        "train": {
            "source": "jsonl",
            "path": "${PLACE}/d.jsonl",
            "environment": {"kind": "judge", "model": "m", "base_url": "http://me:${TOKEN}@host/v1"},
        }
    },
    "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_new_tokens": 8},
    "training": {"num_steps": 4},
    "evaluation": {"at_start": False, "at_end": False},
    "optimizer": {"lr": "LR"},
    "packing": {"max_tokens_per_microbatch": 256},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("LR", "1e-4")


def load(tmp_path: Path, *overrides: str, **train: Any) -> GrpoConfig:
    data = yaml.safe_load(yaml.safe_dump(GRPO))
    data["data"]["train"]["environment"].update(train)
    text = yaml.safe_dump(data).replace("lr: LR", "lr: ${LR}")
    (tmp_path / "c.yaml").write_text(text)
    return load_config(GrpoConfig, tmp_path / "c.yaml", overrides, check_files=False)


def base_url(config: GrpoConfig) -> str:
    environment: Any = config.data.train.environment  # type: ignore[union-attr]
    return str(environment.base_url)


def test_it_is_used_and_not_written(tmp_path: Path) -> None:
    config = load(tmp_path, "logging.wandb={project: 'p-${TOKEN}'}")
    assert base_url(config) == f"http://me:{SECRET}@host/v1"
    written = public(config)
    assert SECRET not in str(written)
    assert written["data"]["train"]["environment"]["base_url"] == "http://me:${TOKEN}@host/v1"
    assert written["logging"]["wandb"]["project"] == "p-${TOKEN}"
    assert written["optimizer"]["lr"] == 1e-4  # a number is no secret
    assert written["run"]["dir"] == f"{tmp_path}/run"  # nor is a path, which readers of the run need
    assert SECRET not in dump_config(config)


def test_what_is_written_reads_back_as_the_same(tmp_path: Path) -> None:
    config = load(tmp_path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    again = load_config(GrpoConfig, tmp_path / "again.yaml", check_files=False)
    assert again == config
    assert SECRET not in dump_config(again)


def test_errors_do_not_print_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, "data.train.environment.max_tokens=0", "rollout.temperature=${TOKEN}")
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError) as caught:
        load(tmp_path, kind="${TOKEN}")
    assert SECRET not in str(caught.value)


def test_a_run_goes_on_with_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with neither key in its directory."""
    directory = RunDirectory(tmp_path / "run")
    directory.open(public(load(tmp_path)))
    directory.start_after(None)
    directory.append_metrics(1, {"loss": 1.0})
    directory.close()
    monkeypatch.setenv("TOKEN", "another-key-of-today")
    assert RunDirectory(tmp_path / "run").open(public(load(tmp_path))) == []
    files = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(SECRET in text or "another-key" in text for text in files)
    with pytest.raises(UserError, match="started with other values") as caught:
        RunDirectory(tmp_path / "run").open(public(load(tmp_path, base_url="http://elsewhere/v1")))
    assert "another-key" not in str(caught.value)
