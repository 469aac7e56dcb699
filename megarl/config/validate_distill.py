"""Rules about distillation (see :mod:`megarl.config.validate` for what a rule is)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.distill import DistillConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _divergence(config: DistillConfig) -> Violations:
    algorithm = config.algorithm
    if algorithm.beta is not None and algorithm.divergence != "jensen_shannon":
        yield Violation(
            ("algorithm", "beta"),
            f"algorithm.divergence = {algorithm.divergence} does not read it (got {algorithm.beta})",
            (("algorithm", "divergence"),),
        )
    if algorithm.teacher_top_k is not None and algorithm.divergence != "forward":
        yield Violation(
            ("algorithm", "teacher_top_k"),
            f"algorithm.divergence = {algorithm.divergence} needs the teacher's whole distribution; use"
            f" forward (got {algorithm.teacher_top_k})",
            (("algorithm", "divergence"),),
        )
    if algorithm.renormalize_top_k is not None and algorithm.teacher_top_k is None:
        yield Violation(
            ("algorithm", "renormalize_top_k"),
            "has no effect: algorithm.teacher_top_k is not set"
            f" (got {str(algorithm.renormalize_top_k).lower()})",
            (("algorithm", "teacher_top_k"),),
        )


def _asynchronous(config: DistillConfig) -> Violations:
    if config.rollout.max_staleness:
        yield Violation(
            ("rollout", "max_staleness"),
            f"not for distill: its samples are the student's as it is (got {config.rollout.max_staleness})",
        )


def _router_replay(config: DistillConfig) -> Violations:
    if config.rollout.router_replay:
        yield Violation(
            ("rollout", "router_replay"),
            "not for distill: the teacher would be given the experts that the student chose (got true)",
        )


DISTILL_RULES: list[Callable[[DistillConfig], Violations]] = [_divergence, _asynchronous, _router_replay]
