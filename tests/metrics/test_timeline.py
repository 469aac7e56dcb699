"""The ranks' timelines: what a rank records, what its file keeps, and what the report has of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megarl.cluster import collectives
from megarl.errors import UserError
from megarl.metrics import report_data
from megarl.metrics.timeline import TimelineWriter, rank_file, read_timeline
from megarl.metrics.timers import PhaseTimers
from megarl.platform import ranges, spans
from megarl.platform.spans import Span
from tests.metrics.test_report import grpo_line, make_run
from tests.metrics.test_timers import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The recorder of this process, on a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(spans, "_recorder", spans.Recorder(clock))
    return clock


def take() -> list[Span]:
    assert spans._recorder is not None
    return spans._recorder.take().spans


def test_phases_are_spans_inside_one_another(clock: Clock) -> None:
    timers = PhaseTimers(ranges.phase, clock)
    clock.now += 1
    with timers("rollout"):
        clock.now += 2
    with timers("train"):
        clock.now += 4
        with ranges.phase("optimizer"):
            clock.now += 8
    clock.now += 16
    expected = [Span(0, "rollout", 1, 3), Span(0, "train", 3, 15), Span(1, "optimizer", 7, 15)]
    assert take() == expected
    with timers("weights"):
        clock.now += 0.5
    assert take() == [Span(0, "weights", 0, 0.5)], "the next step begins where the last one ended"


def test_an_open_phase_goes_on_into_the_next_step(clock: Clock) -> None:
    with spans.span("evaluation"):
        clock.now += 1
        assert take() == []
        clock.now += 2
    assert take() == [Span(0, "evaluation", 0, 2)]


def test_spans_that_touch_are_one_and_flashes_are_left_out(clock: Clock) -> None:
    for _ in range(3):
        with spans.span("wait"):
            clock.now += 8
        clock.now += 2**-10
    with spans.span("train"):
        clock.now += 2**-10
    assert take() == [Span(0, "wait", 0, 24 + 2**-9)]


def test_waits_of_two_phases_stay_two(clock: Clock) -> None:
    for phase in ("weights", "evaluation"):
        with spans.span(phase), spans.span("wait"):
            clock.now += 1
    waits = [(span.begin, span.end) for span in take() if span.name == "wait"]
    assert waits == [(0, 1), (1, 2)]


def test_an_error_closes_its_spans(clock: Clock) -> None:
    def fail() -> None:
        with spans.span("train"), spans.span("optimizer"):
            clock.now += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(span.depth, span.name) for span in take()] == [(0, "train"), (1, "optimizer")]


def test_only_ranks_that_have_others_wait(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = collectives.dist
    monkeypatch.setattr(collectives, "_groups", [None])
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert collectives.broadcast(7) == 7
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def exchange(box: list[Any], **options: Any) -> None:
        clock.now += 3

    monkeypatch.setattr(dist, "broadcast_object_list", exchange)
    collectives.broadcast(7)
    assert take() == [Span(0, "wait", 0, 3)]


def line(seconds: float, *found: tuple[int, str, float, float], start: float = 100.0) -> dict[str, Any]:
    return {"start": start, "seconds": seconds, "spans": [list(span) for span in found]}


def write(folder: Path, rank: int, steps: range, *, world_size: int = 2, after: int = -1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = TimelineWriter(folder, rank, world_size, after)
    for step in steps:
        writer.write(step, line(1.0, (0, "train", 0.0, step / 1000)))
    writer.close()


def test_every_line_is_found_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "timeline", 0, range(3, 100, 3))
    for step in range(102):
        found = read_timeline(tmp_path, [step], 10**6)
        if step % 3 or not 3 <= step < 100:
            assert found == {}
        else:
            assert found[step][0]["spans"] == [[0, "train", 0.0, step / 1000]]


def test_a_resumed_run_writes_its_steps_anew(tmp_path: Path) -> None:
    folder = tmp_path / "timeline"
    for rank in (0, 1):
        write(folder, rank, range(1, 11))
    with rank_file(folder, 0).open("a") as handle:
        handle.write('{"step":11,"sta')  # killed here
    assert set(read_timeline(tmp_path, range(20), 10**6)) == set(range(1, 11))
    write(folder, 0, range(7, 9), world_size=1, after=6)
    steps = {
        rank: [json.loads(text)["step"] for text in rank_file(folder, rank).read_text().splitlines()]
        for rank in (0, 1)
    }
    assert steps == {0: [1, 2, 3, 4, 5, 6, 7, 8], 1: [1, 2, 3, 4, 5, 6]}, "rank 1 is no more"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "timeline").mkdir()
    rank_file(tmp_path / "timeline", 3).write_text("oops\n")
    with pytest.raises(UserError, match=r"rank_00003\.jsonl, at byte 0"):
        read_timeline(tmp_path, [1], 10**6)


def test_the_report_has_the_lane_of_a_slow_rank(tmp_path: Path) -> None:
    """Two ranks of this process take turns, one of them asleep in a phase."""
    recorders = [spans.Recorder(), spans.Recorder()]
    (tmp_path / "timeline").mkdir()
    for rank, recorder in enumerate(recorders):
        timers = PhaseTimers(ranges.phase)
        writer = TimelineWriter(tmp_path / "timeline", rank, 2, after=-1)
        recorder.start()
        spans.record(recorder)
        try:
            for phase in ("logprobs", "train"):
                with timers(phase):  # type: ignore[arg-type]
                    time.sleep(0.05 if (phase, rank) == ("logprobs", 1) else 0.005)
        finally:
            spans.record(None)
        writer.write(1, recorder.take().row())
        writer.close()
    [entry] = make_run(tmp_path, [grpo_line(1)]).data["timeline"]
    lanes = {
        each["rank"]: {name: end - begin for _, name, begin, end in each["spans"]} for each in entry["ranks"]
    }
    assert (entry["step"], set(lanes)) == (1, {0, 1})
    assert 0.05 <= lanes[1]["logprobs"] < 0.5
    assert 0.005 <= lanes[0]["logprobs"] < lanes[1]["logprobs"]
    assert set(lanes[0]) == {"logprobs", "train"}


def test_the_report_has_the_last_and_the_slowest_steps_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "timeline", 0, range(1, 1001))
    size = rank_file(tmp_path / "timeline", 0).stat().st_size // 1000
    monkeypatch.setattr(report_data, "MAX_TIMELINE_BYTES", 20 * size)
    lines = [grpo_line(step) | {"seconds": 9.0 if step in (17, 711) else 2.0} for step in range(1, 1001)]
    found = [entry["step"] for entry in make_run(tmp_path, lines).data["timeline"]]
    assert {17, 711, 1000} <= set(found)
    assert 15 <= len(found) <= 20
