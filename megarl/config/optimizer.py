"""Settings of the optimizer and its schedule."""

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
    """Megatron's AdamW, the learning-rate schedule and gradient clipping."""

    lr: Annotated[float, Field(gt=0), at_most(1000)]
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Final learning rate of linear and cosine schedules."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after warm-up, over the run's optimizer steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of the linear warm-up from 0. A run that ends before says so at its start."""
    weight_decay: Annotated[float, Field(ge=0), at_most(1000)] = 0.0
    """Decoupled weight decay (norms and biases excluded)."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, Field(ge=1e-30), at_most(1)] = 1e-8
    """Epsilon, added to the square root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    distributed: bool = False
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    def notes(self, at: str, num_steps: int) -> list[str]:
        """Return a line if a run of ``num_steps`` optimizer steps (0: not known yet) ends in the warm-up.

        ``at`` is the path of this section.
        """
        if not num_steps or self.lr_warmup_steps <= num_steps:
            return []
        run = f"the run's {num_steps} optimizer step{'s' if num_steps > 1 else ''}"
        warmup = f"{at}.lr_warmup_steps = {self.lr_warmup_steps}"
        return [f"the peak learning rate is never reached: {warmup} exceeds {run}"]

    @rule
    def _learning_rates(self) -> Problems:
        """`min_lr` must not exceed `lr`."""
        if self.min_lr > self.lr:
            yield "min_lr", f"must not exceed {HERE}lr = {self.lr} (got {self.min_lr})", "lr"
