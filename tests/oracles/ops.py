"""Each vocabulary and policy op in plain torch, for any float dtype: the oracle of the native ops.

Readable rather than fast; differentiable by autograd alone. Shapes and arguments are those of the ops.
"""

from __future__ import annotations

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
    ratio = log_ratio.exp()
    clamped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.objective == "cispo":
        loss = -advantages * clamped.detach() * logprobs
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * clamped)
        if options.dual_clip is not None:
            bounded = torch.minimum(loss, -advantages * options.dual_clip)
            loss = torch.where(advantages < 0, bounded, loss)
    loss = loss * _off_policy_weight(old_logprobs, counted, options, rollout_logprobs, sequence_ids)
    if options.kl != "none":
        assert ref_logprobs is not None
        d = ref_logprobs - logprobs
        value = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[options.kl]
        if options.kl_gradient == "score":
            surrogate = d.square() / 2
            value = value.detach() + surrogate - surrogate.detach()
        loss = loss + options.kl_coef * value
    if entropy is not None:
        loss = loss - options.entropy_coef * entropy
    return (weights * loss.masked_fill(~counted, 0.0)).sum()


def _off_policy_weight(
    old_logprobs: torch.Tensor,
    counted: torch.Tensor,
    options: PolicyLossOptions,
    rollout_logprobs: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
) -> torch.Tensor:
    if options.correction == "none":
        return torch.ones_like(old_logprobs)
    assert rollout_logprobs is not None
    log_weight = old_logprobs - rollout_logprobs
    if options.correction.startswith("sequence"):
        assert sequence_ids is not None
        log_weight = _sequence_mean(log_weight, counted, sequence_ids)
    weight = log_weight.exp()
    if options.correction.endswith("tis"):
        return weight.clamp(max=options.correction_high)
    inside = (weight >= options.correction_low) & (weight <= options.correction_high)
    return inside * (weight if options.correction == "icepop" else 1.0)


def _sequence_mean(values: torch.Tensor, counted: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(values)
    for sequence in sequence_ids.unique().tolist():
        tokens = (sequence_ids == sequence) & counted
        result[tokens] = values[tokens].mean()
    return result


def _expectation(log_weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_j exp(log_weights) values, where a weight of 0 counts as 0 whatever the value."""
    nowhere = log_weights == -torch.inf
    return (log_weights.exp() * values.masked_fill(nowhere, 0.0)).sum(-1)


def _column(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
