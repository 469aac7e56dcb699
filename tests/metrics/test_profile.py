"""profile.steps: the traced steps, and the phases in a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megarl.config.run import ProfileConfig
from megarl.metrics.profile import StepProfiler
from megarl.metrics.timers import PhaseTimers
from megarl.platform import ranges


@pytest.mark.parametrize(
    ("steps", "expected"), [([], set()), ([2, 7], {2, 7}), (["3-5"], {3, 4, 5}), ([1, "4-4"], {1, 4})]
)
def test_steps(steps: list[int | str], expected: set[int]) -> None:
    assert ProfileConfig(steps=steps).traced == expected


def test_a_trace_has_the_phases_of_its_step_only(tmp_path: Path) -> None:
    timers = PhaseTimers(ranges.phase)
    profiler = StepProfiler(ProfileConfig(steps=[2]), tmp_path / "profile", rank=0)
    paths = []
    for step, phase in ((1, "rollout"), (2, "train"), (3, "weights")):
        profiler.begin(step)
        with timers(phase), ranges.phase(f"inner_{step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        paths.append(profiler.end(step))
    assert paths == [None, tmp_path / "profile" / "step_2_rank_0.json", None]
    events = json.loads(paths[1].read_text())["traceEvents"]  # type: ignore[union-attr]
    names = {event.get("name") for event in events}
    assert {"train", "inner_2", "aten::mm"} <= names
    assert not {"rollout", "inner_1", "weights", "inner_3"} & names
    train, inner = (next(e for e in events if e.get("name") == name) for name in ("train", "inner_2"))
    assert train["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= train["ts"] + train["dur"]


def test_other_ranks_trace_nothing(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[1], ranks=[0]), tmp_path, rank=1)
    profiler.begin(1)
    assert profiler.end(1) is None


def test_the_stack_follows_errors_and_progress() -> None:
    def fail() -> None:
        with ranges.phase("outer"), ranges.phase("inner"):
            assert ranges.phase_stack() == ("outer", "inner")
            raise ZeroDivisionError

    before = ranges.progress()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert ranges.phase_stack() == ("outer", "inner")  # where the error came from
    ranges.tick()
    assert ranges.progress() == before + 5
    with ranges.phase("next"):
        assert ranges.phase_stack() == ("next",)
    assert ranges.phase_stack() == ()
