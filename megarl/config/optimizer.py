"""The optimizer and its schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import (
    HERE,
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    Problems,
    Section,
    at_most,
    rule,
)


class OptimizerConfig(Section):
    """Megatron's AdamW, its schedule and gradient clipping."""

    lr: Annotated[float, Field(gt=0), at_most(1000)]
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Where linear and cosine schedules end."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, over the run's optimizer steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: Annotated[float, Field(ge=0), at_most(1000)] = 0.0
    """Decoupled weight decay (norms and biases excluded)."""
    adam_beta1: Decay = 0.9
    """First-moment decay."""
    adam_beta2: Decay = 0.95
    """Second-moment decay."""
    adam_eps: Annotated[float, Field(gt=0), at_most(1)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    @rule
    def _learning_rates(self) -> Problems:
        if self.min_lr > self.lr:
            yield "min_lr", f"must not exceed {HERE}lr = {self.lr} (got {self.min_lr})", "lr"
