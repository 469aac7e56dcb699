"""PolicyLoss against its formulas token by token in float64, and its gradients against theirs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megarl.losses.base import LossTokens
from megarl.losses.policy import PolicyLoss, kl_estimate

LOW, HIGH, BETA = 0.2, 0.3, 0.7


def make_tokens(cur: list[float], **fields: Any) -> LossTokens:
    count = len(cur)
    values: dict[str, Any] = {
        "weights": [1.0 / count] * count,
        "entropy": [0.0] * count,
        "advantages": [1.0] * count,
        "old_logprobs": None,
        "ref_logprobs": None,
    } | fields
    tensors = {name: None if v is None else torch.tensor(v) for name, v in values.items()}
    return LossTokens(
        logprobs=torch.tensor(cur, requires_grad=True),
        labels=torch.zeros(count, dtype=torch.int64),
        sequence_ids=torch.zeros(count, dtype=torch.int64),
        rollout_logprobs=None,
        **tensors,
    )


def token_by_hand(cur: float, old: float, ref: float, a: float, kind: str) -> tuple[float, float, float]:
    """One token in float64: policy loss, KL, and the gradient of policy loss + BETA * KL by cur."""
    ratio = math.exp(cur - old)
    if a >= 0:
        clipped = ratio > 1 + HIGH
        policy = -a * min(ratio, 1 + HIGH)
    else:
        clipped = ratio < 1 - LOW
        policy = -a * max(ratio, 1 - LOW)
    d = ref - cur
    kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kind]
    kl_gradient = {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}[kind]
    return policy, kl, (0.0 if clipped else -a * ratio) + BETA * kl_gradient


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_values_and_gradients_of_every_token(kind: Any) -> None:
    torch.manual_seed(0)
    count = 200
    cur = (torch.randn(count) - 3).tolist()
    # Ratios far below, inside and far above the clip range, with advantages of both signs and none.
    old = [c - r for c, r in zip(cur, (torch.randn(count) * 0.4).tolist(), strict=True)]
    ref = [c + r for c, r in zip(cur, (torch.randn(count) * 0.8).tolist(), strict=True)]
    advantages = torch.randn(count)
    advantages[::17] = 0
    weights = torch.rand(count) / count
    fp32 = [torch.tensor(x).double().tolist() for x in (cur, old, ref, advantages.tolist(), weights.tolist())]
    by_hand = [token_by_hand(*values, kind) for values in zip(*fp32[:4], strict=True)]
    ratios = [math.exp(c - o) for c, o in zip(fp32[0], fp32[1], strict=True)]
    active = [
        (r > 1 + HIGH and a > 0) or (r < 1 - LOW and a < 0) for r, a in zip(ratios, fp32[3], strict=True)
    ]
    outside = sum(r > 1 + HIGH or r < 1 - LOW for r in ratios)
    assert 20 < sum(active) < outside < 180, "the case covers what clips and what does not"

    tokens = make_tokens(
        cur,
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=advantages.tolist(),
        weights=weights.tolist(),
        entropy=[0.5] * count,
    )
    result = PolicyLoss(LOW, HIGH, kl_coef=BETA, kl_estimator=kind)(tokens)
    [gradient] = torch.autograd.grad(result.loss, tokens.logprobs)

    def mean(values: list[float]) -> float:
        return sum(w * v for w, v in zip(fp32[4], values, strict=True))

    expected = {
        "policy_loss": mean([policy for policy, _, _ in by_hand]),
        "kl_ref": mean([kl for _, kl, _ in by_hand]),
        "weight": sum(fp32[4]),
        "advantage_mean": mean(fp32[3]),
        "ratio_mean": mean(ratios),
        "kl_policy": mean([r - 1 - math.log(r) for r in ratios]),
        "clip_fraction": mean([float(c) for c in active]),
        "entropy": mean([0.5] * count),
    }
    assert {k: float(v) for k, v in result.sums.items()} == pytest.approx(expected, rel=2e-6, abs=1e-7)
    assert result.maxima["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-6)
    assert float(result.loss.detach()) == pytest.approx(
        expected["policy_loss"] + BETA * expected["kl_ref"], rel=2e-6
    )
    gradients = [w * g for w, (_, _, g) in zip(fp32[4], by_hand, strict=True)]
    assert gradient.tolist() == pytest.approx(gradients, rel=1e-5, abs=1e-9)
    assert not any(value.requires_grad for value in (result.sums | result.maxima).values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (1.25, 2.0, -2.5, -2.5, 0.0),  # inside the higher upper clip
        (1.5, 2.0, -2.6, 0.0, 1.0),  # good enough already: no further push up
        (0.5, 2.0, -1.0, -1.0, 0.0),  # a good token that became rarer is pushed up again
        (0.5, -2.0, 1.6, 0.0, 1.0),  # bad and rare enough already
        (1.5, -2.0, 3.0, 3.0, 0.0),  # a bad token that became likelier is pushed down
        (1.5, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_cases_of_clipping(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: float
) -> None:
    tokens = make_tokens([-1.0], old_logprobs=[-1.0 - math.log(ratio)], advantages=[advantage])
    result = PolicyLoss(LOW, HIGH, kl_coef=0.0, kl_estimator="k3")(tokens)
    result.loss.backward()
    assert tokens.logprobs.grad is not None
    assert float(result.loss.detach()) == pytest.approx(loss, abs=1e-6)
    assert tokens.logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert float(result.sums["clip_fraction"]) == clipped
    assert "kl_ref" not in result.sums


def test_on_policy_the_ratio_is_exactly_one() -> None:
    torch.manual_seed(0)
    advantages = torch.randn(64)
    tokens = make_tokens((torch.randn(64) * 3).tolist(), advantages=advantages.tolist())
    result = PolicyLoss(LOW, HIGH, kl_coef=0.0, kl_estimator="k3")(tokens)
    assert float(result.maxima["ratio_max"]) == 1.0
    assert float(result.sums["kl_policy"]) == 0.0
    assert float(result.sums["clip_fraction"]) == 0.0
    [gradient] = torch.autograd.grad(result.loss, tokens.logprobs)
    assert torch.equal(gradient, -advantages / 64)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradients_by_finite_differences(kind: Any) -> None:
    torch.manual_seed(0)
    cur = torch.randn(32, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(32, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: kl_estimate(c, ref, kind), (cur,))


def test_estimators_agree_with_the_divergence_they_estimate() -> None:
    """Weighted by the policy itself, k1 and k3 sum to KL(cur || ref) exactly; k2 is close when both are."""
    torch.manual_seed(0)
    cur = torch.randn(50, dtype=torch.float64).log_softmax(0)
    ref = (cur + 0.05 * torch.randn(50, dtype=torch.float64)).log_softmax(0)
    exact = (cur.exp() * (cur - ref)).sum()
    for kind, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.05)):
        estimate = (cur.exp() * kl_estimate(cur, ref, kind)).sum()  # type: ignore[arg-type]
        assert estimate.item() == pytest.approx(exact.item(), rel=tolerance)
