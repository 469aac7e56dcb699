"""support_min_logit against a sampler written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from megarl.ops import reference, support_min_logit, token_logprob


def sampler_support(row: list[float], temperature: float, top_k: int, top_p: float) -> float:
    """Smallest logit kept: sort, cut at k (ties stay), then add probabilities until top_p is reached."""
    ordered = sorted(row, reverse=True)
    if top_k:
        cut = ordered[min(top_k, len(ordered)) - 1]
        ordered = [value for value in ordered if value >= cut]
    weights = [math.exp((value - ordered[0]) / temperature) for value in ordered]
    reached = 0.0
    for value, weight in zip(ordered, weights, strict=True):
        reached += weight
        if reached >= top_p * sum(weights):
            return value
    return ordered[-1]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.6), (12, 0.83), (500, 0.999)]
)
@pytest.mark.parametrize("max_extra_bytes", [2**20, 1])
def test_matches_a_sampler(top_k: int, top_p: float, max_extra_bytes: int) -> None:
    logits = 3 * torch.randn(9, 200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[4] = logits[4].round()  # many ties
    ours = support_min_logit(
        logits, temperature=0.8, top_k=top_k, top_p=top_p, max_extra_bytes=max_extra_bytes
    )
    assert ours.tolist() == [sampler_support(row, 0.8, top_k, top_p) for row in logits.tolist()]


def test_logprobs_are_renormalised_over_the_support() -> None:
    logits = 3 * torch.randn(6, 5000, generator=torch.Generator().manual_seed(3))
    min_logit = support_min_logit(logits, temperature=0.7, top_k=50, top_p=0.9)
    kept = logits >= min_logit.unsqueeze(1)
    probabilities = torch.softmax(logits.double() / 0.7, -1) * kept
    probabilities /= probabilities.sum(-1, keepdim=True)
    targets = probabilities.argmax(-1)
    ours = token_logprob(logits, targets, temperature=0.7, min_logit=min_logit)
    torch.testing.assert_close(ours.logprob.double(), probabilities.amax(-1).log(), atol=4e-6, rtol=4e-6)
    expected = reference.token_logprob(logits.double(), targets, 0.7, min_logit.double())
    torch.testing.assert_close(ours.entropy.double(), expected[1], atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": -1}, "top_k must not be negative, got -1"), ({"top_p": 0.0}, "got 0.0")],
)
def test_wrong_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"megarl::support_min_logit: .*{message}"):
        support_min_logit(torch.zeros(2, 3), **arguments)  # type: ignore[arg-type]
