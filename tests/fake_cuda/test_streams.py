"""With delayed work, missing synchronisation gives wrong numbers, and correct synchronisation right ones."""

from __future__ import annotations

import pytest

from tests.fake_cuda.conftest import FakeGpu

PROGRAM = "programs/streams.py"


@pytest.mark.parametrize(
    ("case", "waits", "right", "wrong"),
    [
        ("between_streams", ("event", "stream", "host"), 2, 1),
        ("before_all_streams_end", ("stream",), 2, 1),
        ("overwritten_early", ("stream",), 1, 7),
        ("pinned_source", ("stream",), 3, 9),
        ("pinned_destination", ("stream",), 5, 0),
    ],
)
def test_missing_wait_shows(
    fake_gpu: FakeGpu, case: str, waits: tuple[str, ...], right: float, wrong: float
) -> None:
    assert fake_gpu.run(PROGRAM, case, *waits, "no", lazy=True) == [[right] * len(waits) + [wrong]]


def test_program_order_hides_a_missing_wait(fake_gpu: FakeGpu) -> None:
    assert fake_gpu.run(PROGRAM, "between_streams", "no") == [[2]]


def test_pageable_source_is_read_at_once(fake_gpu: FakeGpu) -> None:
    assert fake_gpu.run(PROGRAM, "pageable_source", lazy=True) == [3]


def test_events_complete_when_asked_or_after_the_delay(fake_gpu: FakeGpu) -> None:
    result = fake_gpu.run(PROGRAM, "event_states", lazy=True, FAKECUDA_STREAM_DELAY=0.5)
    assert result == [[False, True, False, True]]


@pytest.mark.parametrize("lazy", [False, True])
def test_ordered_work_gives_what_program_order_gives(fake_gpu: FakeGpu, lazy: bool) -> None:
    assert fake_gpu.run(PROGRAM, "random_program", "3", "4", lazy=lazy) == [[True, True]]
