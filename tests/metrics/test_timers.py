"""Phases are exclusive and add up to the wall time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megarl.metrics.timers import PHASES, PhaseTimers


class Clock:
    """A clock that advances on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nested_phases_count_every_second_once() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    clock.now += 1  # other
    with timers("rollout"):
        clock.now += 2
        with timers("reward"):
            clock.now += 4
            with timers("rollout"):
                clock.now += 8
        with timers("other"):
            clock.now += 16
        clock.now += 32
    clock.now += 64  # other
    assert timers.end_step() == {
        "seconds": 127.0,
        "seconds_rollout": 42.0,
        "seconds_reward": 4.0,
        "seconds_logprobs": 0.0,
        "seconds_train": 0.0,
        "seconds_weights": 0.0,
        "seconds_other": 81.0,
    }


def test_steps_start_anew_and_totals_grow() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    clock.now += 50  # start-up
    timers.start_step()
    for seconds in (1.0, 2.0):
        with timers("train"):
            clock.now += seconds
        assert timers.seconds("train") == seconds
        clock.now += 0.5
        step = timers.end_step()
        assert timers.last_step == step
        assert (step["seconds_train"], step["seconds_other"]) == (seconds, 0.5)
    assert timers.totals == dict.fromkeys(PHASES, 0.0) | {"train": 3.0, "other": 1.0}


def test_a_phase_that_raises_is_still_closed() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)

    def fail() -> None:
        with timers("train"):
            clock.now += 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 1
    step = timers.end_step()
    assert (step["seconds_train"], step["seconds_other"]) == (3.0, 1.0)


def test_the_range_hook_wraps_every_phase_in_order() -> None:
    events = []

    @contextmanager
    def hook(name: str) -> Iterator[None]:
        events.append(f"push {name}")
        yield
        events.append(f"pop {name}")

    timers = PhaseTimers(range_hook=hook)
    with timers("train"), timers("logprobs"):
        events.append("work")
    assert events == ["push train", "push logprobs", "work", "pop logprobs", "pop train"]


def test_misuse_is_an_assertion() -> None:
    timers = PhaseTimers()
    with pytest.raises(AssertionError, match="inside phase 'train'"), timers("train"):
        timers.end_step()
    with pytest.raises(AssertionError, match="'rolout'"), timers("rolout"):  # type: ignore[arg-type]
        pass
