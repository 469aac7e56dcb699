"""`import megarl`: jobs as functions, repeatedly in one process, with functions defined in the script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import megarl
from megarl.api import _import_path, _overrides
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from tests.end_to_end.harness import GRPO, SFT, make_model, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("api") / "model")


def test_everything_public_is_there_and_nothing_heavy_is_loaded() -> None:
    for name in megarl.__all__:
        assert callable(getattr(megarl, name))
        assert not (Path(megarl.__file__).parent / name).exists(), f"a package would take the place of {name}"
    assert set(megarl.__all__) <= set(dir(megarl))
    stub = (Path(megarl.__file__).parent / "__init__.pyi").read_text()
    assert set(megarl.__all__) == {line.split()[-1] for line in stub.splitlines() if line.startswith("from")}
    code = "import sys, megarl; megarl.sft; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'sftt'"):
        megarl.sftt  # noqa: B018


def test_settings_become_the_same_configuration(tmp_path: Path) -> None:
    """Nested or dotted, with texts that YAML would read as numbers."""
    config = write_config(tmp_path / "c.yaml", GRPO, run_dir=tmp_path / "run", model=tmp_path)
    settings = {
        "training": {"num_steps": 7},
        "optimizer.lr": 1e-5,
        "run.dir": "007",
        "logging": {"wandb": None},
    }
    loaded = load_config(GrpoConfig, config, _overrides(settings), check_files=False)
    raw = yaml.safe_load(config.read_text())
    raw["training"]["num_steps"], raw["optimizer"]["lr"] = 7, 1e-5
    raw["run"]["dir"], raw["logging"] = "007", {"wandb": None}
    assert loaded == GrpoConfig.model_validate(raw)


def test_a_function_travels_by_value(tmp_path: Path) -> None:
    offset = 3

    def reward(prompt: str, response: str, answer: str) -> float:
        return offset + len(response)

    path = _import_path(reward, tmp_path)
    module, _, name = path.partition(":")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import {module} as m; print(m.{name}('', 'ab', ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5"
    assert _import_path(load_config, tmp_path) == "megarl.config.load:load_config"


def test_mistakes_are_the_commands_own_lines(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path / "c.yaml", SFT, run_dir=tmp_path / "run", model=model)
    with pytest.raises(megarl.UserError, match=r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?"):
        megarl.sft(config, optimizer={"lrr": 1})
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_process(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a file and from a mapping: the same losses, as the command's; then the first again: complete."""
    config = write_config(
        tmp_path / "c.yaml", SFT, run_dir=tmp_path / "a", model=model, training={"num_steps": 4}
    )
    first = megarl.sft(config)
    second = megarl.sft(yaml.safe_load(config.read_text()), run={"dir": str(tmp_path / "b")})
    losses = [[row["loss"] for row in each.metrics if "loss" in row] for each in (first, second)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    assert first.summary["validation_loss"] == second.summary["validation_loss"]
    assert (first.model / "config.json").is_file() and first.report.is_file()
    capfd.readouterr()
    assert megarl.sft(config).metrics == first.metrics
    assert "complete, 4 of 4 steps" in capfd.readouterr().out


@pytest.mark.slow
def test_a_reward_and_a_loss_defined_here_reach_every_process(tmp_path: Path, model: Path) -> None:
    """The reward goes to environment workers, the loss to the trainer's ranks."""
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} + {i}", "answer": "{2 * i}"}}\n' for i in range(64)))
    wanted = "1"

    def has_a_one(prompt: str, response: str, answer: str) -> float:
        return float(wanted in response)

    def plain(tokens: Any) -> Any:
        return -(tokens.logprobs - tokens.old_logprobs).exp() * tokens.advantages, {
            "of_here": tokens.advantages * 0 + 7
        }

    source = {"source": "jsonl", "path": str(file), "prompt_field": "prompt", "answer_field": "answer"}
    config = write_config(tmp_path / "c.yaml", GRPO, run_dir=tmp_path / "run", model=model)
    result = megarl.grpo(
        config,
        reward={has_a_one: 0.5},
        loss=plain,
        data={"train": source, "held_out": None},
        evaluation={"at_start": False, "at_end": False},
        training={"num_steps": 2},
    )
    assert [row["of_here"] for row in result.metrics] == pytest.approx([7.0, 7.0])
    assert all(0 <= row["reward_mean"] <= 0.5 for row in result.metrics)
