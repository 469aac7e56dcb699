"""Settings of `megarl distill`: on-policy distillation from a teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.hub import ModelPath
from megarl.config.metric_names import DISTILL
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.config.section import PositiveInt, Problems, Section, rule


class DistillAlgorithmConfig(OnlineAlgorithm):
    """On-policy distillation (arXiv:2306.13649)."""

    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    """forward: KL(teacher || student), reverse: KL(student || teacher), jensen_shannon: between the two."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in jensen_shannon's mixture; null: 0.5."""
    teacher_top_k: PositiveInt | None = None
    """Compare only the teacher's k likeliest tokens (forward only); null: the full vocabulary, exact."""
    renormalize_top_k: bool | None = None
    """Scale the teacher's top-k probabilities to sum to 1; false: drop the rest of the mass; null: true."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """token: sum over tokens / T; sequence: mean over each sequence's tokens, then / S."""
    num_optimizer_steps_per_batch: PositiveInt = 1
    """Mini-batches of a rollout batch, split by prompt: optimizer steps per epoch."""
    num_epochs_per_batch: PositiveInt = 1
    """Epochs over the rollout batch."""

    @rule
    def _divergence(self) -> Problems:
        """`beta` needs `divergence: jensen_shannon`, `teacher_top_k` needs `divergence: forward`,
        `renormalize_top_k` needs `teacher_top_k`."""
        divergence = f"algorithm.divergence = {self.divergence}"
        if self.divergence != "jensen_shannon":
            yield from self.unused("beta", f"{divergence} does not read it", "divergence")
        if self.divergence != "forward":
            why = f"{divergence} needs the teacher's full distribution; use forward"
            yield from self.unused("teacher_top_k", why, "divergence")
        if self.teacher_top_k is None:
            why = "has no effect: algorithm.teacher_top_k is not set"
            yield from self.unused("renormalize_top_k", why, "teacher_top_k")


class TeacherConfig(Section):
    """The frozen teacher."""

    path: ModelPath
    """Directory or hub id of a model with the student's vocabulary; any supported family and size."""


class DistillConfig(OnlineConfig):
    """Root of `megarl distill`."""

    algorithm: DistillAlgorithmConfig = DistillAlgorithmConfig()
    teacher: TeacherConfig

    metric_names: ClassVar[frozenset[str]] = DISTILL
    refused: ClassVar[dict[str, str]] = {
        "rollout.max_staleness": "not for distill: it needs samples of the current student",
        "rollout.router_replay": "not for distill: it would replay the student's experts in the teacher",
    }

    def describe_algorithm(self) -> list[str]:
        """Return the line on the teacher."""
        return [f"teacher: {self.teacher.path}"]
