"""Checks of a run's metrics, shown at the top of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megarl.errors import see
from megarl.records import NON_FINITE_WEIGHTS

DIFFERENCE_LIMITS = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest |rollout - trainer logprob| of one policy: measured 4e-5 in fp32, up to 0.28 in bf16."""

_RECENT = 10  # steps over which recent means are taken
_FALL = 0.05  # of accuracy since its best; on some hundred problems smaller ones are noise


@dataclass(frozen=True, slots=True)
class Check:
    """One line at the top of the report."""

    tone: Literal["ok", "warn", "bad"]
    text: str


def run_checks(steps: Sequence[Mapping[str, Any]], dtype: str) -> list[Check]:
    """Return findings on merged steps, the most severe first; a single "ok" if there are none."""
    findings = [*_non_finite(steps), *_disagreement(steps, DIFFERENCE_LIMITS[dtype])]
    equal = _recent_mean(steps, "zero_std_groups_fraction")
    if equal is not None and equal >= 0.9:
        findings.append(
            Check(
                "warn",
                f"In the last steps {equal:.0%} of the groups had equal rewards: they teach nothing. "
                f"The problems are too easy or too hard for the model{see('equal-rewards')}.",
            )
        )
    cut = _recent_mean(steps, "truncated_fraction")
    if cut is not None and cut >= 0.5:
        findings.append(
            Check(
                "warn",
                f"In the last steps {cut:.0%} of the responses were cut at rollout.max_new_tokens"
                f"{see('cut-responses')}.",
            )
        )
    findings += _fallen_accuracy(steps)
    order = {"bad": 0, "warn": 1}
    findings.sort(key=lambda check: order[check.tone])
    agree = ", engine and trainer agree" if any("logprob_abs_diff_max" in step for step in steps) else ""
    return findings or [Check("ok", f"No warnings: all values finite{agree}.")]


def failures(values: Mapping[str, float]) -> list[str]:
    """Return phrases for metrics of an optimizer step that show that it failed."""
    found = [f"{name} is {value}" for name, value in non_finite(values).items() if _decides(name)]
    # An infinity here is a logprob of -inf, which the off-policy corrections handle.
    if math.isnan(difference := values.get("logprob_abs_diff_mean", 0.0)):
        found.append(f"logprob_abs_diff_mean is {difference}")
    for name, value in values.items():
        if name.endswith(NON_FINITE_WEIGHTS) and value > 0:
            whose = name.removesuffix(NON_FINITE_WEIGHTS).replace("_", " ")
            found.append(f"{whose}weights are not finite")
    return found


def non_finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are NaN or infinite."""
    return {name: value for name, value in values.items() if not math.isfinite(value)}


def _decides(name: str) -> bool:
    """Return whether a metric affects the weights: losses and gradient norms."""
    return not name.startswith("validation_") and (name == "loss" or name.endswith(("_loss", "grad_norm")))


def _non_finite(steps: Sequence[Mapping[str, Any]]) -> list[Check]:
    found: dict[str, list[int]] = {}
    for step in steps:
        for name, value in step.items():
            if isinstance(value, str) and not math.isfinite(float(value)):
                found.setdefault(name, []).append(step["step"])
    checks = []
    for name, where in found.items():
        more = f", and at {len(where) - 1} later steps" if len(where) > 1 else ""
        checks.append(Check("bad", f"{name} is not a finite number at step {where[0]}{more}."))
    for step in steps:
        if any(float(value) > 0 for name, value in step.items() if name.endswith(NON_FINITE_WEIGHTS)):
            checks.append(Check("bad", f"After step {step['step']} weights are not finite."))
            break
    return checks


def _disagreement(steps: Sequence[Mapping[str, Any]], limit: float) -> list[Check]:
    above = [
        (float(step["logprob_abs_diff_max"]), step["step"])
        for step in steps
        if float(step.get("logprob_abs_diff_max") or 0.0) > limit
    ]
    if not above:
        return []
    worst, step = max(above)
    return [
        Check(
            "warn",
            f"Engine and trainer logprobs differ by up to {worst:.2g} (step {step}; {len(above)} steps above "
            f"the limit {limit:g}): they may not be the same policy{see('logprob-difference')}.",
        )
    ]


def _fallen_accuracy(steps: Sequence[Mapping[str, Any]]) -> list[Check]:
    found = [(float(step["accuracy"]), step["step"]) for step in steps if step.get("accuracy") is not None]
    if len(found) < 3:
        return []
    (best, step), (last, _) = max(found, key=lambda each: each[0]), found[-1]
    if not best - last >= _FALL:
        return []
    return [
        Check(
            "warn",
            f"Held-out accuracy fell from {best:.1%} at step {step} to {last:.1%}: "
            "checkpoint.keep_best_metric: accuracy keeps the best checkpoint.",
        )
    ]


def _recent_mean(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(step[name]) for step in steps if step.get(name) is not None][-_RECENT:]
    return sum(values) / len(values) if values else None
