"""Random states go through a file and come back; the file runs nothing."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megarl import platform
from megarl.errors import UserError
from megarl.trainer import random_state


@pytest.fixture(autouse=True)
def _current(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform is not installed: that would patch torch for all tests of this process."""
    monkeypatch.setattr(platform, "current", lambda: SimpleNamespace(name=platform.chosen_name()))


def saved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a file gives back."""
    torch.save(state, random_state.file(folder, 0))
    found = random_state.read(folder, 0, 1)
    assert found is not None
    return found


def draws() -> tuple[Any, ...]:
    generator = numpy.random.random(3).tolist()
    return random.random(), random.gauss(0, 1), generator, torch.rand(3).tolist()


def test_the_same_numbers_follow(tmp_path: Path) -> None:
    random.gauss(0, 1)  # which keeps a second one back
    found = saved(random_state.take(), tmp_path)
    expected = draws()
    assert draws() != expected
    assert random_state.put(found)
    assert draws() == expected


def test_states_of_before_are_read(tmp_path: Path) -> None:
    """numpy's as numpy gives it, with an array."""
    found = saved(random_state.take() | {"numpy": numpy.random.get_state()}, tmp_path)
    expected = draws()
    assert random_state.put(found)
    assert draws() == expected


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_it_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rng_00000\.pt: damaged, or not a random state"):
        saved(random_state.take() | {"more": Runs(tmp_path / "ran")}, tmp_path)
    assert not (tmp_path / "ran").exists()
    random_state.file(tmp_path, 0).write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match=r"rng_00000\.pt: damaged"):
        random_state.read(tmp_path, 0, 1)
