"""The critic's loss (Schulman et al. 2017, arXiv:1707.06347, with the clip of their implementation).

    1/2 max((V - R)^2, (clamp(V, V_old - c, V_old + c) - R)^2)

V is the value before a token, R its return, c = value_clip: a value that has moved by c towards its return
gets no more gradient from this batch. Without c the loss is 1/2 (V - R)^2. ``value_loss`` and ``value_mean``
are weighted like the policy's loss; ``value_clip_fraction`` is the share of tokens without gradient because
of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megarl.losses.base import LossResult
from megarl.losses.score_inputs import ScoreTokens


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Configured loss; ``clip`` None: no clipping."""

    clip: float | None

    def __call__(self, tokens: ScoreTokens) -> LossResult:
        """Return the loss, with gradient to ``tokens.scores``."""
        assert tokens.returns is not None
        values, weights = tokens.scores, tokens.weights
        errors = (values - tokens.returns) ** 2
        count = torch.tensor(float(values.numel()), dtype=torch.float64)
        token_sums = {"tokens": count}
        if self.clip is not None:
            assert tokens.old_values is not None
            near = torch.clamp(values, tokens.old_values - self.clip, tokens.old_values + self.clip)
            clipped = (near - tokens.returns) ** 2
            # Where both are equal, torch.maximum would split the gradient; nothing is clipped there.
            token_sums["value_clip_fraction"] = (clipped > errors).double().sum()
            errors = torch.where(clipped > errors, clipped, errors)
        loss = 0.5 * (weights * errors).sum()
        sums = {
            "value_loss": loss.detach().double(),
            "value_mean": (weights * values.detach()).double().sum(),
            "weight": weights.double().sum(),
        }
        return LossResult(loss, sums, token_sums)
