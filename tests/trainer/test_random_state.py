"""Random states go through a file and come back; the file runs nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megarl import platform
from megarl.errors import UserError

platform.install()  # before what imports megatron.core

from megarl.trainer.megatron.checkpoint import _read_rng, _rng_state, _set_rng_state  # noqa: E402


def draws() -> tuple[Any, ...]:
    generator = numpy.random.random(3).tolist()
    return random.random(), random.gauss(0, 1), generator, torch.rand(3).tolist()


def test_the_same_numbers_follow(tmp_path: Path) -> None:
    random.gauss(0, 1)  # which keeps a second one back
    torch.save(_rng_state(), tmp_path / "rng.pt")
    expected = draws()
    assert draws() != expected
    assert _set_rng_state(_read_rng(tmp_path / "rng.pt"))
    assert draws() == expected


def test_states_of_before_are_read(tmp_path: Path) -> None:
    """numpy's as numpy gives it, with an array."""
    state = _rng_state() | {"numpy": numpy.random.get_state()}
    torch.save(state, tmp_path / "rng.pt")
    expected = draws()
    assert _set_rng_state(_read_rng(tmp_path / "rng.pt"))
    assert draws() == expected


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_it_runs_nothing(tmp_path: Path) -> None:
    torch.save(_rng_state() | {"more": Runs(tmp_path / "ran")}, tmp_path / "rng.pt")
    with pytest.raises(UserError, match=r"rng\.pt: damaged, or not a random state"):
        _read_rng(tmp_path / "rng.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "rng.pt").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match=r"rng\.pt: damaged"):
        _read_rng(tmp_path / "rng.pt")
