"""The configured policy-gradient loss of GRPO; formulas and kernels are in :mod:`megarl.ops.policy_loss`.

Metrics: the weighted means ``loss`` (the differentiated value), ``policy_loss``, ``advantage_mean``,
``entropy`` and ``kl_ref`` follow algorithm.loss_aggregation; ``ratio_mean``, ``kl_policy`` (k3 estimate of
KL(old || current)), ``clip_fraction``, ``dual_clip_fraction``, ``correction_weight_mean`` and
``corrected_fraction`` are plain means over the tokens with a loss. ``nll_positive`` is the mean of -logprob
over the tokens of positive examples (VAPO, arXiv:2504.05118), which nll_coef adds to the loss; ``drift`` the
weighted mean of (logprob - old logprob)^2, which drift_coef adds (Kimi K2.5, arXiv:2602.02276).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.losses.base import LossResult, LossTokens
from megarl.ops.policy_loss import SUM_NAMES, PolicyLossOptions, policy_loss


def options_of(algorithm: GrpoAlgorithmConfig) -> PolicyLossOptions:
    """Return the op's options for a valid configuration."""

    def bound(value: float | None) -> float:
        return math.inf if value is None else value

    return PolicyLossOptions(
        objective=algorithm.objective,
        level=algorithm.ratio_level,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        correction=algorithm.off_policy_correction,
        correction_low=algorithm.off_policy_low or 0.0,
        correction_high=bound(algorithm.off_policy_high),
        correction_token_high=bound(algorithm.off_policy_token_high),
        sequence_weight=algorithm.off_policy_sequence_weight,
        log_ratio_clamp=bound(algorithm.log_ratio_clamp),
        kl=algorithm.kl_estimator if algorithm.kl_coef > 0 else "none",
        kl_gradient=algorithm.kl_gradient,
        kl_coef=algorithm.kl_coef,
        kl_input_clamp=bound(algorithm.kl_input_clamp_value),
        kl_output_clamp=bound(algorithm.kl_output_clamp_value),
        entropy_coef=algorithm.entropy_coef,
        positive=_shape(algorithm, "pos"),
        negative=_shape(algorithm, "neg"),
    )


def _shape(algorithm: GrpoAlgorithmConfig, sign: str) -> tuple[float, float]:
    """Return the parameters of sapo and vespo for advantages of one sign."""
    if algorithm.objective == "vespo":
        return getattr(algorithm, f"vespo_k_{sign}"), getattr(algorithm, f"vespo_lambda_{sign}")
    return getattr(algorithm, f"sapo_temperature_{sign}"), 0.0


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Configured loss; ``old_logprobs`` None means that the current logprobs are the old ones (ratio 1)."""

    options: PolicyLossOptions
    check_numerics: bool = False
    nll_coef: float = 0.0
    drift_coef: float = 0.0
    is_mean: bool = True  # weights sum to 1 over the step (not with a fixed length)

    def __call__(self, tokens: LossTokens) -> LossResult:
        """Return the loss, with gradient to ``tokens.logprobs`` and, if configured, ``tokens.entropy``."""
        assert tokens.advantages is not None
        options = self.options
        old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
        result = policy_loss(
            tokens.logprobs,
            old,
            tokens.advantages,
            tokens.weights,
            options=options,
            entropy=tokens.entropy if options.entropy_coef else tokens.entropy.detach(),
            ref_logprobs=None if options.kl == "none" else tokens.ref_logprobs,
            rollout_logprobs=tokens.rollout_logprobs if options.reads_rollout else None,
            sequence_ids=tokens.slots if options.by_sequence else None,
            num_sequences=tokens.num_slots if options.by_sequence else None,
            cp_group=tokens.cp_group,
            check_numerics=self.check_numerics,
        )
        op = dict(zip(SUM_NAMES, result.sums.unbind(), strict=True))
        weights = tokens.weights.double()
        sums = {
            "loss": op["loss"],
            "policy_loss": op["policy_loss"],
            "advantage_mean": weights @ tokens.advantages.double(),
            "entropy": op["entropy_loss"],
        }
        if self.is_mean:
            sums["weight"] = weights.sum()
        loss = result.loss
        if self.nll_coef:
            assert tokens.nll_weights is not None
            nll = -(tokens.nll_weights * tokens.logprobs).sum()
            loss = loss + self.nll_coef * nll
            sums["nll_positive"] = nll.detach().double()
            sums["loss"] = sums["loss"] + self.nll_coef * sums["nll_positive"]
        if self.drift_coef:
            moved = torch.where(tokens.weights != 0, tokens.logprobs - old, 0.0)
            drift = (tokens.weights * moved.square()).sum()
            loss = loss + self.drift_coef * drift
            sums["drift"] = drift.detach().double()
            sums["loss"] = sums["loss"] + self.drift_coef * sums["drift"]
        token_sums = {
            "tokens": op["tokens"],
            "ratio_mean": op["ratio"],
            "kl_policy": op["old_kl"],
            "clip_fraction": op["clipped_low"] + op["clipped_high"],
        }
        if options.kl != "none":
            sums["kl_ref"] = op["kl_loss"]
        if options.dual_clip is not None:
            token_sums["dual_clip_fraction"] = op["dual_clipped"]
        if options.correction != "none":
            token_sums["correction_weight_mean"] = op["correction_weight"]
            token_sums["corrected_fraction"] = op["corrected"]
        if options.level == "sequence" or options.objective == "vespo":
            assert result.sequence_sums is not None
            total, _, count = result.sequence_sums[result.sequence_sums[:, 2] > 0].unbind(1)
            log_ratios = total if options.objective == "vespo" else total / count
        else:
            log_ratios = tokens.logprobs.detach() - old
        maxima = {"ratio_max": log_ratios.amax().exp()} if log_ratios.numel() else {}
        return LossResult(loss, sums, token_sums, maxima)
