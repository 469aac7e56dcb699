"""User-defined policy terms (algorithm.loss), in plain torch, under every parallel layout.

The function takes a microbatch's :class:`megarl.losses.base.LossTokens` and returns one value per token, [N],
with gradient to ``tokens.logprobs`` (or ``tokens.entropy``). The loss is their sum times ``tokens.weights``,
which carry the denominators of the whole step: the function never divides by a number of tokens, sequences or
ranks. ``tokens.sequence_means`` computes means over whole sequences, whichever ranks hold their tokens. The
function may return ``(values, {name: values})``: further values [N] per token whose weighted means are logged
under these names. KL to the reference, entropy bonus and the likelihood term are added as configured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from megarl.config.dotted import load_function
from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.errors import UserError
from megarl.losses.base import LossResult, LossTokens
from megarl.losses.policy import PolicyLoss, options_of

TokenLoss = Callable[[LossTokens], torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
_BUILTIN_METRICS = ("clip_fraction", "dual_clip_fraction")  # metrics of the built-in term


@dataclass(frozen=True, slots=True)
class CustomPolicyLoss:
    """A loss whose policy term is ``function``; ``rest`` computes the other terms and the metrics.

    ``name`` is the function's name in the configuration, for error messages.
    """

    function: TokenLoss
    name: str
    rest: PolicyLoss

    @property
    def is_mean(self) -> bool:
        """True if weights sum to 1 over the step."""
        return self.rest.is_mean

    def __call__(self, tokens: LossTokens) -> LossResult:
        """Return the loss, with gradient to the inputs of the function and of the configured terms.

        Raises:
            UserError: the function did not return [N] values.
        """
        advantages = tokens.advantages
        assert advantages is not None
        if tokens.old_logprobs is None:  # one optimizer step per batch: the current logprobs are the old ones
            tokens = replace(tokens, old_logprobs=tokens.logprobs.detach())
        counted = tokens.counted()
        found = self.function(counted)
        values, logged = found if isinstance(found, tuple) else (found, {})
        weights = counted.weights
        self._check("its loss", values, weights)
        term = (weights * values).sum()
        result = self.rest(replace(tokens, advantages=torch.zeros_like(tokens.weights)))
        figure = term.detach().double()
        sums = result.sums | {
            "loss": result.sums["loss"] + figure,
            "policy_loss": figure,
            "advantage_mean": tokens.weights.double() @ advantages.double(),
        }
        for name, each in logged.items():
            self._check(name, each, weights)
            sums[name] = (weights * each.detach()).double().sum()
        token_sums = {k: v for k, v in result.token_sums.items() if k not in _BUILTIN_METRICS}
        return LossResult(result.loss + term, sums, token_sums, result.maxima)

    def _check(self, what: str, values: object, weights: torch.Tensor) -> None:
        if not isinstance(values, torch.Tensor) or values.shape != weights.shape:
            got = f"shape {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise UserError(
                f"algorithm.loss: {self.name} must return one value per token, [{len(weights)}]; {what} has "
                f"{got}"
            )


def configured_loss(algorithm: GrpoAlgorithmConfig, *, check_numerics: bool) -> PolicyLoss | CustomPolicyLoss:
    """Build the loss of a valid configuration.

    Raises:
        UserError: algorithm.loss cannot be imported, or is no function.
    """
    loss = PolicyLoss(
        options_of(algorithm),
        check_numerics,
        nll_coef=algorithm.positive_nll_coef,
        drift_coef=algorithm.drift_coef,
        is_mean=algorithm.loss_aggregation != "fixed_length",
    )
    if algorithm.loss is None:
        return loss
    return CustomPolicyLoss(load_function(algorithm.loss, "algorithm.loss"), algorithm.loss, loss)
