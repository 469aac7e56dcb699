"""Series that the report derives from a run's metrics: other x axes, the best step, the trainer's FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.metrics.summary import as_number

# Dense bfloat16 TFLOP/s without sparsity, from NVIDIA's data sheets; the first name that fits counts.
_PEAK_TFLOPS = {
    "B300": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
_GOALS = (("accuracy", max), ("validation_accuracy", max), ("validation_loss", min))


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation of a run."""

    metric: str
    step: int
    value: float
    last: float  # of the last evaluation


def x_axes(steps: Sequence[Mapping[str, Any]], samples_per_step: int | None) -> dict[str, list[float]]:
    """Return samples, tokens and hours of training up to every step, where they are known."""
    axes: dict[str, list[float]] = {}
    if samples_per_step:
        axes["samples"] = [float(step["step"] * samples_per_step) for step in steps]
    for name, metric, scale in (("tokens", "num_tokens", 1.0), ("hours", "seconds", 1 / 3600)):
        total, sums = 0.0, []
        for step in steps:
            total += (as_number(step.get(metric)) or 0.0) * scale
            sums.append(total)
        if total > 0:
            axes[name] = sums
    return axes


def best_step(steps: Sequence[Mapping[str, Any]]) -> Best | None:
    """Return the best of several evaluations, by accuracy, validation_accuracy or validation_loss."""
    for metric, better in _GOALS:
        found = [(float(step[metric]), step["step"]) for step in steps if step.get(metric) is not None]
        found = [(value, step) for value, step in found if value == value]
        if len(found) > 1:
            value = better(value for value, _ in found)
            return Best(metric, next(step for v, step in found if v == value), value, found[-1][0])
    return None


def add_training_rate(steps: Sequence[dict[str, Any]], start: Mapping[str, Any] | None) -> None:
    """Add train_tflops and, on a GPU of known peak, train_mfu to the steps that have a training speed.

    FLOPs are 6 per active parameter and token, for forward and backward; attention's own and recomputation
    are not counted. MFU is their rate as a share of the ranks' peak (PaLM: Chowdhery et al. 2022,
    arXiv:2204.02311, without its attention term).
    """
    if start is None or not (parameters := start.get("active_parameters")):
        return
    device = str(start.get("device", ""))
    peak = next((tflops for name, tflops in _PEAK_TFLOPS.items() if name in device), None)
    for step in steps:
        if (rate := as_number(step.get("tokens_per_second_train"))) is not None:
            step["train_tflops"] = 6 * parameters * rate / 1e12
            if peak is not None:
                step["train_mfu"] = step["train_tflops"] / (peak * start.get("num_ranks", 1))
