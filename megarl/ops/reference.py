"""Each vocabulary and policy op in plain torch, for any float dtype: what the native ops are compared with.

Readable rather than fast; differentiable by autograd alone. Shapes and arguments are those of the ops.
"""

from __future__ import annotations

import torch


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


def support_min_logit(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Smallest logit [T] that top-k (0: off), then top-p over what is left, keep."""
    ordered = logits.sort(-1, descending=True).values
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        kept = ordered >= ordered[:, min(top_k, ordered.shape[1]) - 1].unsqueeze(1)
    probabilities = torch.softmax((ordered / temperature).masked_fill(~kept, -torch.inf), -1)
    before = probabilities.cumsum(-1) - probabilities
    kept &= before < top_p
    return ordered.masked_fill(~kept, torch.inf).amin(-1)


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


def _expectation(log_weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_j exp(log_weights) values, where a weight of 0 counts as 0 whatever the value."""
    nowhere = log_weights == -torch.inf
    return (log_weights.exp() * values.masked_fill(nowhere, 0.0)).sum(-1)


def _column(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
