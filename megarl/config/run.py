"""Where a run lives, how its processes start and are watched, and what is profiled."""

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
    """Where a run lives, what makes it repeatable, and when it counts as hung."""

    dir: PathText
    """Run directory; starting the same command again resumes from it."""
    seed: Seed = 1
    """Seeds model initialisation, data order and sampling."""
    hang_timeout_seconds: Seconds = 1800.0
    """End the run when a rank gives no sign of life, or no rank finishes anything, for this long."""
    on_non_finite: Literal["stop", "warn"] = "stop"
    """What NaN or infinity in a loss, a gradient norm or the weights does: stop ends the run at once, warn
    says so and goes on. Neither saves such a step."""
    on_changed_inputs: Literal["warn", "refuse"] = "warn"
    """What a resumed run does when its data, model directories, tokenizer, code of your own or packages have
    changed: go on with a line for each, or end with it."""


class ProfileConfig(Section):
    """Which steps are profiled."""

    steps: list[PositiveInt | StepRange] = Field(default_factory=list)
    """Steps to trace with the torch profiler into <run.dir>/profile: numbers and ranges, e.g. [2, 5-7]."""
    ranks: list[NonNegativeInt] = Field(default=[0])
    """Trainer ranks that trace."""

    @property
    def traced(self) -> frozenset[int]:
        """The steps themselves."""
        return frozenset(step for item in self.steps for step in _steps_of(item))

    @rule
    def _ranges(self) -> Problems:
        for item in self.steps:
            if not _steps_of(item):
                yield "steps", f"a range goes from its smaller to its larger step (got {item!r})"


def _steps_of(item: int | str) -> range:
    first, _, last = str(item).partition("-")
    return range(int(first), int(last or first) + 1)
