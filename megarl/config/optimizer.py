"""The optimizer and its schedule."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import (
    HERE,
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Problems,
    Section,
    rule,
)


class OptimizerConfig(Section):
    """Megatron's AdamW, its schedule and gradient clipping."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Where linear and cosine schedules end."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, over the run's optimizer steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (norms and biases excluded)."""
    adam_beta1: Decay = 0.9
    """First-moment decay."""
    adam_beta2: Decay = 0.95
    """Second-moment decay."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    @rule
    def _learning_rates(self) -> Problems:
        if self.min_lr > self.lr:
            yield "min_lr", f"must not exceed {HERE}lr = {self.lr} (got {self.min_lr})", "lr"
