"""How a mixture of experts chooses, and how its experts are kept busy."""

from __future__ import annotations

from megarl.config.section import NonNegativeFloat, Section


class RouterConfig(Section):
    """How experts are kept evenly busy while training; for models that have experts."""

    aux_loss_coef: NonNegativeFloat | None = 0.0
    """Weight of the load-balancing loss, per microbatch; null: config.json's router_aux_loss_coef."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Change per step of the bias by which experts are chosen (DeepSeek-V3: 0.001), towards equal loads."""
