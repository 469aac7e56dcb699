"""Summary of a run from its metrics lines, for the report until summary.json exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.metrics.timers import PHASES


def as_number(value: Any) -> float | None:
    """Convert a metric of metrics.jsonl (a number, or "NaN", "Infinity") to float; None stays None."""
    return None if value is None else float(value)


def merge_steps(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge the lines of each step (an evaluation is a second line); return one dict per step, ascending."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def summarize(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute totals, maxima, first and last values over merged steps; keys as in summary.json.

    Seconds are those of the steps, without start-up. Metrics that no step has are omitted.
    """

    def values(name: str) -> list[float]:
        return [float(step[name]) for step in steps if step.get(name) is not None]

    summary: dict[str, Any] = {}
    for name in ("accuracy", "validation_accuracy", "validation_loss", "loss", "reward_mean"):
        if found := values(name):
            summary[f"{name}_after"] = found[-1]
            if len(found) > 1:
                summary[f"{name}_before"] = found[0]
    trained = [step for step in steps if step["step"] > 0]
    if seconds := values("seconds"):
        summary["wall_seconds"] = sum(seconds)
        summary["phase_seconds"] = {phase: sum(values(f"seconds_{phase}")) for phase in PHASES}
    speeds = {}
    for phase in ("rollout", "train"):
        # weight each rate by the seconds of its step
        pairs = [
            (float(step[f"tokens_per_second_{phase}"]), float(step[f"seconds_{phase}"]))
            for step in trained
            if step.get(f"tokens_per_second_{phase}") is not None and step.get(f"seconds_{phase}") is not None
        ]
        spent = sum(seconds for _, seconds in pairs)
        if spent > 0:
            speeds[phase] = sum(rate * seconds for rate, seconds in pairs) / spent
    if speeds:
        summary["tokens_per_second"] = speeds
    if moved := values("weights_bytes_moved"):
        summary["weights_bytes_moved"] = int(sum(moved))
    if differences := values("logprob_abs_diff_max"):
        summary["logprob_abs_diff_max"] = max(differences)
    return summary
