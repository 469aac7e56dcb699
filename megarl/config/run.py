"""Settings of the run directory, launcher, watchdog and profiler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import (
    NonNegativeInt,
    PathText,
    PositiveInt,
    Problems,
    Seconds,
    Section,
    Seed,
    rule,
)

Launcher = Literal["auto", "ray"]
StepRange = Annotated[str, Field(pattern=r"^[1-9][0-9]*-[1-9][0-9]*$")]


class RunConfig(Section):
    """Run directory, seed and failure detection."""

    dir: PathText
    """Run directory; the same command run again resumes from it."""
    seed: Seed = 1
    """Seed of model initialisation, data order and sampling."""
    hang_timeout_seconds: Seconds = 1800.0
    """Stop the run if a rank sends no heartbeat, or no rank makes progress, for this long."""
    on_non_finite: Literal["stop", "warn"] = "stop"
    """On NaN or infinity in a loss, gradient norm or the weights: stop the run, or warn and continue. Such a
    step is never saved."""
    on_changed_inputs: Literal["warn", "refuse"] = "warn"
    """On resume, if data, model directories, tokenizer, user code or packages have changed: warn (one line
    each) and continue, or refuse to resume."""


class ProfileConfig(Section):
    """Steps and ranks to profile."""

    steps: list[PositiveInt | StepRange] = Field(default_factory=list)
    """Steps to trace with the torch profiler into <run.dir>/profile: numbers and ranges, e.g. [2, 5-7]."""
    ranks: list[NonNegativeInt] = Field(default=[0])
    """Trainer ranks to trace."""

    @property
    def traced(self) -> frozenset[int]:
        """The traced steps, ranges expanded."""
        return frozenset(step for item in self.steps for step in _steps_of(item))

    @rule
    def _ranges(self) -> Problems:
        """The first step of a range in `steps` must not exceed its last."""
        for item in self.steps:
            if not _steps_of(item):
                yield "steps", f"a range must have first <= last (got {item!r})"


def _steps_of(item: int | str) -> range:
    first, _, last = str(item).partition("-")
    return range(int(first), int(last or first) + 1)
