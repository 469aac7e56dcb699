"""Each vocabulary and policy op in plain torch, for any float dtype: the oracle of the native ops.

Readable rather than fast; differentiable by autograd alone. Shapes and arguments are those of the ops.
"""

from __future__ import annotations

import math

import torch

from megarl.ops.policy_loss import PolicyLossOptions


def log_softmax_over_support(
    logits: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    min_logit: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(logits / temperature) [T, V] over logits >= min_logit [T] and the targets [T]."""
    if min_logit is not None:
        support = logits >= min_logit.unsqueeze(1)
        if targets is not None:
            support = support.scatter(1, targets.unsqueeze(1), True)
        logits = logits.masked_fill(~support, -torch.inf)
    return torch.log_softmax(logits / _column(temperature), -1)


def token_logprob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    min_logit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob of targets and entropy, both [T]."""
    logprobs = log_softmax_over_support(logits, temperature, min_logit, targets)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), _expectation(logprobs, -logprobs)


def vocab_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    direction: str = "forward",
    temperature: float | torch.Tensor = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Divergence [T] between the softmaxes of two logits [T, V]; see megarl/ops/vocab_kl.py."""
    log_p = log_softmax_over_support(student, temperature)
    log_q = log_softmax_over_support(teacher, temperature)
    if direction == "forward":
        return _expectation(log_q, log_q - log_p)
    if direction == "reverse":
        return _expectation(log_p, log_p - log_q)
    log_beta = torch.log(torch.tensor(beta, dtype=log_p.dtype))
    log_rest = torch.log(torch.tensor(1 - beta, dtype=log_p.dtype))
    log_mixture = torch.logaddexp(log_rest + log_p, log_beta + log_q)
    return (1 - beta) * _expectation(log_p, log_p - log_mixture) + beta * _expectation(
        log_q, log_q - log_mixture
    )


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    options: PolicyLossOptions,
    entropy: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss []; megarl/ops/policy_loss.py has the formulas."""
    counted = weights != 0
    log_ratio = logprobs - old_logprobs
    if options.level == "sequence":
        assert sequence_ids is not None
        mean = _sequence_mean(log_ratio.detach(), counted, sequence_ids)
        log_ratio = mean + logprobs - logprobs.detach()
    bound = options.log_ratio_clamp
    ratio = log_ratio.clamp(-bound, bound).exp()
    clamped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.objective == "cispo":
        loss = -advantages * clamped.detach() * logprobs
    elif options.objective == "sapo":
        hot, cold = logprobs.new_tensor([options.positive[0], options.negative[0]])
        heat = torch.where(advantages > 0, hot, cold)
        loss = -advantages * torch.sigmoid(heat * (ratio - 1)) * 4 / heat
    elif options.objective == "dppo":
        moved = (logprobs.exp() - old_logprobs.exp()).detach() * advantages.sign()
        limit = torch.where(advantages > 0, options.clip_high, options.clip_low)
        loss = -advantages * ratio * (moved <= limit)
    elif options.objective == "vespo":
        assert sequence_ids is not None
        total = _sequence_mean(log_ratio.detach(), counted, sequence_ids, product=True)
        total = total.clamp(math.log(1e-8), 20).clamp(-bound, bound)
        good, bad = torch.tensor(options.positive), torch.tensor(options.negative)
        k, decay = torch.where(advantages[:, None] >= 0, good, bad).unbind(1)
        loss = -advantages * (decay + k * total - decay * total.exp()).exp() * logprobs
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * clamped)
        if options.dual_clip is not None:
            bounded = torch.minimum(loss, -advantages * options.dual_clip)
            loss = torch.where(advantages < 0, bounded, loss)
    loss = loss * _off_policy_weight(old_logprobs, counted, options, rollout_logprobs, sequence_ids)
    if options.kl != "none":
        assert ref_logprobs is not None
        loss = loss + options.kl_coef * _kl(logprobs, old_logprobs, ref_logprobs, rollout_logprobs, options)
    if entropy is not None:
        loss = loss - options.entropy_coef * entropy
    return (weights * loss.masked_fill(~counted, 0.0)).sum()


def _kl(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor | None,
    options: PolicyLossOptions,
) -> torch.Tensor:
    """The estimate of the KL to the reference, with the gradient that was asked for."""
    bound = options.kl_input_clamp
    d = (ref_logprobs - logprobs).clamp(-bound, bound)
    value = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[options.kl]
    if options.kl_gradient.startswith("unbiased"):
        start = {"unbiased": logprobs.detach(), "unbiased_old": old_logprobs}
        drawn_by = start.get(options.kl_gradient, rollout_logprobs)
        assert drawn_by is not None
        limit = options.log_ratio_clamp
        weight = (logprobs - drawn_by).clamp(-limit, limit).exp()
        inside = (ref_logprobs - logprobs).abs() <= bound
        value = value * torch.where(inside, weight, weight.detach())
    value = value.clamp(-options.kl_output_clamp, options.kl_output_clamp)
    if options.kl_gradient == "score":
        surrogate = (ref_logprobs - logprobs).square() / 2
        value = value.detach() + surrogate - surrogate.detach()
    return value


def _off_policy_weight(
    old_logprobs: torch.Tensor,
    counted: torch.Tensor,
    options: PolicyLossOptions,
    rollout_logprobs: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
) -> torch.Tensor:
    correction, low, high = options.correction, options.correction_low, options.correction_high
    if correction == "none":
        return torch.ones_like(old_logprobs)
    assert rollout_logprobs is not None
    log_weight = old_logprobs - rollout_logprobs
    bound = options.log_ratio_clamp
    of_token = log_weight.clamp(-bound, bound).exp()
    if correction.startswith("sequence"):
        assert sequence_ids is not None
        product = options.sequence_weight == "product"
        log_weight = _sequence_mean(log_weight, counted, sequence_ids, product=product)
    weight = log_weight.clamp(-bound, bound).exp()
    if correction in ("tis", "sequence_tis"):
        return weight.clamp(low, high)
    inside = (weight >= low) & (weight <= high)
    if correction == "sequence_mask":
        return inside * 1.0
    if correction == "sequence_mask_tis":
        return inside * of_token.clamp(max=options.correction_token_high)
    return inside * weight


def _sequence_mean(
    values: torch.Tensor, counted: torch.Tensor, sequence_ids: torch.Tensor, *, product: bool = False
) -> torch.Tensor:
    """The mean over each sequence's counted tokens, or for a product of exponentials the sum."""
    result = torch.zeros_like(values)
    for sequence in sequence_ids.unique().tolist():
        tokens = (sequence_ids == sequence) & counted
        result[tokens] = values[tokens].sum() if product else values[tokens].mean()
    return result


def _expectation(log_weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_j exp(log_weights) values, where a weight of 0 counts as 0 whatever the value."""
    nowhere = log_weights == -torch.inf
    return (log_weights.exp() * values.masked_fill(nowhere, 0.0)).sum(-1)


def _column(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
