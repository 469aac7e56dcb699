"""support_min_logit against a sampler written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from megarl.ops import (
    linear_support_min_logit,
    linear_token_logprob,
    support_min_logit,
    token_logprob,
)
from tests.oracles import ops as reference


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


@pytest.mark.parametrize("top_p", [0.5, 0.97, 0.99999])
def test_top_p_of_a_large_vocabulary(top_p: float) -> None:
    """The support may lie within the first candidates, or beyond them in some rows."""
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits *= torch.tensor([0.1, 1.0, 3.0, 6.0, 20.0], dtype=torch.float64).unsqueeze(1)
    ours = support_min_logit(logits, top_p=top_p)
    assert ours.tolist() == [sampler_support(row, 1.0, 0, top_p) for row in logits.tolist()]


@pytest.mark.parametrize(("top_k", "top_p"), [(40, 1.0), (0, 0.9), (300, 0.8), (0, 1.0)])
@pytest.mark.parametrize("max_extra_bytes", [2**24, 2**12])
def test_a_head_and_its_support(top_k: int, top_p: float, max_extra_bytes: int) -> None:
    """Logprob, entropy and gradients of a head whose logits come in tiles, some without any support."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(9, 16, generator=generator)
    weight = torch.randn(9000, 16, generator=generator)
    exact = [leaf.double().requires_grad_() for leaf in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    kept = [sampler_support(row, 0.8, top_k, top_p) for row in logits.tolist()]
    smallest = torch.tensor(kept, dtype=torch.float64)
    targets = torch.randint(0, 9000, (9,), generator=generator)
    targets[:5] = logits[:5].argmax(-1)  # the others are outside: a sampler drew them by another rounding
    expected = reference.token_logprob(logits, targets, 0.8, smallest)

    sampler = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    between = linear_support_min_logit(hidden, weight, **sampler, max_extra_bytes=max_extra_bytes)  # type: ignore[arg-type]
    left_out = logits.masked_fill(logits >= smallest.unsqueeze(1), -torch.inf).amax(-1)
    assert (between < smallest - 1e-6).all()
    assert (between > left_out).all() or not (top_k or top_p < 1)

    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
    ours = linear_token_logprob(
        *leaves, targets, temperature=0.8, min_logit=between, max_extra_bytes=max_extra_bytes
    )
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=2e-5)
    directions = torch.randn(2, 9, generator=generator)
    sum((d * v).sum() for d, v in zip(directions, ours, strict=True)).backward()  # type: ignore[union-attr]
    sum((d * v).sum() for d, v in zip(directions.double(), expected, strict=True)).backward()  # type: ignore[union-attr]
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": -1}, "top_k must not be negative, got -1"), ({"top_p": 0.0}, "got 0.0")],
)
def test_wrong_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"megarl::support_min_logit: .*{message}"):
        support_min_logit(torch.zeros(2, 3), **arguments)  # type: ignore[arg-type]
