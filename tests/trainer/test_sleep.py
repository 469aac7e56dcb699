"""An optimizer's tensors in sleep and wake, by address."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.trainer.megatron.sleep import Sleeper


@pytest.fixture
def optimizer() -> Any:
    """Adam over a master copy, after a step; one chunk whose own parameter is bfloat16."""
    master = torch.nn.Parameter(torch.randn(5, 3))
    adam = torch.optim.Adam([master], lr=0.1)
    master.grad = torch.ones_like(master)
    adam.step()
    return SimpleNamespace(optimizer=adam)


def tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    [master] = optimizer.optimizer.param_groups[0]["params"]
    return {"master": master.data, **optimizer.optimizer.state[master]}


def test_host_memory_is_kept_and_all_copies_are_under_way_together(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, blocking = [], []
    empty_like, copy = torch.empty_like, torch.Tensor.copy_

    def make(*args: Any, **options: Any) -> torch.Tensor:
        made.append(1)
        return empty_like(*args, **options)

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        blocking.append(not non_blocking)
        return copy(self, source, non_blocking)

    sleeper = Sleeper([torch.nn.Linear(2, 2, dtype=torch.bfloat16)], optimizer, torch.device("cpu"))
    monkeypatch.setattr(torch, "empty_like", make)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    before = {name: tensor.clone() for name, tensor in tensors(optimizer).items()}
    places = []
    for _ in range(3):
        awake = {name: tensor.data_ptr() for name, tensor in tensors(optimizer).items()}
        sleeper.sleep(["optimizer"])
        asleep = {name: tensor.data_ptr() for name, tensor in tensors(optimizer).items()}
        assert all(awake[name] != asleep[name] for name in before)
        places.append(asleep)
        sleeper.wake()
        back = tensors(optimizer)
        assert all(torch.equal(before[name], back[name]) for name in before)
        assert not {tensor.data_ptr() for tensor in back.values()} & set(asleep.values()), "copies of them"
    assert places[0] == places[1] == places[2]
    assert len(made) == len(before), "once in the life of a run"
    assert not any(blocking[: len(before)])
    optimizer.optimizer.step()  # what is back is what the optimizer works with
    assert not torch.equal(before["master"], tensors(optimizer)["master"])
