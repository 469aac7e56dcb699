"""training.num_epochs: the steps that follow, what is written of them, and settings that do not fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.load import dump_config, load_config
from megarl.config.preference import DpoConfig, RmConfig
from megarl.config.sft import SftConfig
from megarl.data.order import PromptOrder
from megarl.errors import UserError
from megarl.run_directory import RunDirectory

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 100}


def load(tmp_path: Path, kind: Any = SftConfig, data: Any = None, **training: Any) -> Any:
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": "m"},
        "profile": {"steps": training.pop("traced", [])},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": training.pop("warmup", 0)},
        "data": {"train": data or GYM},
        "training": {"batch_size": 8} | training,
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))
    return load_config(kind, file, check_files=False)


@pytest.mark.parametrize("epochs", [1, 2, 0.5, 0.03, 1.7])
@pytest.mark.parametrize("rows", [3, 96, 100])
def test_every_row_is_drawn_that_many_times(tmp_path: Path, rows: int, epochs: float) -> None:
    """The last step is the first to reach the end of the last epoch."""
    config = load(tmp_path, num_epochs=epochs).with_steps(rows)
    steps, batch = config.num_optimizer_steps, 8
    assert (steps - 1) * batch < epochs * rows <= steps * batch
    drawn = Counter(PromptOrder(rows, shuffle=True, seed=1).batch(0, steps * batch))
    assert all(drawn[row] >= int(epochs) for row in range(rows))


@pytest.mark.parametrize("kind", [SftConfig, DpoConfig, RmConfig])
def test_one_of_the_two(tmp_path: Path, kind: type) -> None:
    for given in ({}, {"num_steps": 3, "num_epochs": 1.0}):
        with pytest.raises(
            UserError, match=r"^training.num_steps: .*training.num_epochs.* \[.*c.yaml:\d+\]$"
        ):
            load(tmp_path, kind, **given)
    assert load(tmp_path, kind, num_epochs=2).num_optimizer_steps == 0
    assert load(tmp_path, kind, num_steps=3).with_steps(100).num_optimizer_steps == 3


def test_what_is_written_are_the_epochs(tmp_path: Path) -> None:
    """So that the same command resumes a run whose data it has not read yet."""
    config = load(tmp_path, num_epochs=2)
    derived = config.with_steps(100)
    assert derived.num_optimizer_steps == derived.training.num_steps == 25
    assert dump_config(derived) == dump_config(config)
    assert yaml.safe_load(dump_config(derived))["training"]["num_steps"] is None
    assert any("25 (2 epochs)" in line for line in derived.describe(None))


def test_settings_that_do_not_fit_the_steps(tmp_path: Path) -> None:
    config = load(tmp_path, num_epochs=1, warmup=20, traced=[20])
    with pytest.raises(UserError, match=r"^profile.steps: the run ends with step 13 \(got 20\)$"):
        config.with_steps(100)
    assert config.with_steps(160).num_optimizer_steps == 20
    assert config.with_steps(160).notes() == []
    shorter = load(tmp_path, num_epochs=1, warmup=20)
    assert shorter.notes() == []  # of a length that is not known yet
    [note] = shorter.with_steps(100).notes()
    assert note.endswith("optimizer.lr_warmup_steps = 20 exceeds the run's 13 optimizer steps")
    mixture = {"source": "mixture", "weights": {"a": 1, "b": 2}, "sources": {"a": GYM, "b": GYM}}
    with pytest.raises(
        UserError, match=r"^training.num_epochs: each source of a weighted mixture has its own"
    ):
        load(tmp_path, data=mixture, num_epochs=1)


def test_a_run_that_has_ended_is_complete(tmp_path: Path) -> None:
    """Before its data are read; with more epochs it goes on."""
    config = load(tmp_path, num_epochs=1)
    directory = RunDirectory(tmp_path / "run")
    for folder in ("checkpoints/step_13", "hf"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    assert directory.check_before_start(config) is None
    directory.write_summary({"sft_steps": 13})
    line = directory.check_before_start(config)
    assert line is not None
    assert "complete, 13 of 13 steps. Increase training.num_epochs to continue" in line
    assert directory.check_before_start(load(tmp_path, num_epochs=2)) is None
