"""Settings of expert load balancing."""

from __future__ import annotations

from megarl.config.section import NonNegativeFloat, Section


class RouterConfig(Section):
    """Load balancing of experts during training; for mixtures of experts."""

    aux_loss_coef: NonNegativeFloat | None = 0.0
    """Weight of the load-balancing loss, per microbatch; null: config.json's router_aux_loss_coef."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Change per step of the routing bias, towards equal loads (DeepSeek-V3: 0.001; 0: off)."""
