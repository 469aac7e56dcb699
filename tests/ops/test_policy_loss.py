"""policy_loss against autograd on the formulas in float64, closed forms, and finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from megarl.ops import PolicyLossOptions, policy_loss
from megarl.ops.policy_loss import SUM_NAMES
from tests.oracles import ops as reference

LENGTHS = [7, 1, 40, 0, 1200, 5]


def sample_batch(dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Logprobs that differ enough from the old ones to reach every clip; a third of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(LENGTHS)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    sequence_ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = -noise(1.0).abs() - 0.1
    advantage_of = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    batch = {
        "logprobs": old + noise(0.4),
        "old_logprobs": old,
        "advantages": advantage_of[sequence_ids],
        "weights": (torch.rand(num_tokens, generator=generator) > 0.33) / 853.0,
        "entropy": noise(1.0).abs(),
        "ref_logprobs": old + noise(0.3),
        "rollout_logprobs": old + noise(0.5),
    }
    batch = {name: tensor.to(dtype) for name, tensor in batch.items()}
    batch["weights"][0] = 1 / 853.0
    return {**batch, "sequence_ids": sequence_ids}


def run(
    batch: dict[str, Any], options: PolicyLossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """Ours: loss, gradient of logprobs, gradient of entropy, sums."""
    leaves = {name: batch[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    result = policy_loss(**{**batch, **leaves}, options=options, num_sequences=len(LENGTHS))
    (3 * result.loss).backward()
    assert leaves["logprobs"].grad is not None and leaves["entropy"].grad is not None
    sums = dict(zip(SUM_NAMES, result.sums.tolist(), strict=True))
    return result.loss.detach(), leaves["logprobs"].grad, leaves["entropy"].grad, sums


def expect(
    batch: dict[str, Any], options: PolicyLossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()
    }
    leaves = {name: exact[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    loss = reference.policy_loss(**{**exact, **leaves}, options=options)
    (3 * loss).backward()
    assert leaves["logprobs"].grad is not None and leaves["entropy"].grad is not None
    return loss.detach(), leaves["logprobs"].grad, leaves["entropy"].grad


def make_options(**fields: Any) -> PolicyLossOptions:
    return PolicyLossOptions(**fields)


CASES = [
    make_options(
        objective=objective,
        level=level,
        correction=correction,
        kl=kl,
        kl_gradient=gradient,
        kl_coef=0.05,
        entropy_coef=0.01,
        clip_high=0.28,
        dual_clip=1.5 if objective == "clip" else None,
        correction_low=0.8,
        correction_high=1.2,
    )
    for (objective, level), (correction, kl, gradient) in itertools.product(
        itertools.product(["clip", "cispo"], ["token", "sequence"]),
        [
            ("none", "none", "plain"),
            ("tis", "k1", "plain"),
            ("icepop", "k2", "plain"),
            ("sequence_mask", "k3", "plain"),
            ("sequence_tis", "k3", "score"),
        ],
    )
]
BAND: dict[str, Any] = {"correction_low": 0.8, "correction_high": 1.2}
CLAMPS: dict[str, Any] = {"log_ratio_clamp": 0.5, "kl_input_clamp": 0.4, "kl_output_clamp": 0.05}
CASES += [
    make_options(**fields, kl_coef=0.05, entropy_coef=0.01)
    for fields in (
        *(
            {"correction": name, "sequence_weight": weight, **BAND}
            for name in ("sequence_mask", "sequence_tis", "sequence_mask_tis", "sequence_icepop")
            for weight in ("geometric_mean", "product")
        ),
        {"correction": "tis", "correction_low": 0.0},
        {"correction": "sequence_mask_tis", "correction_token_high": 1.3, **BAND},
        {"correction": "sequence_mask_tis", "correction_token_high": 1.3, **BAND, **CLAMPS},
        {"correction": "icepop", **BAND, **CLAMPS, "kl": "k3"},
        *(
            {"kl": kl, "kl_gradient": gradient, **clamps}
            for kl in ("k1", "k2", "k3")
            for gradient in ("plain", "score", "unbiased", "unbiased_old", "unbiased_rollout")
            for clamps in ({}, CLAMPS)
        ),
        *(
            {"objective": name, "level": level, **extra, **clamps}
            for name, level, extra in (
                ("clip", "token", {}),
                ("clip", "sequence", {"clip_high": 0.01}),
                ("cispo", "token", {}),
                ("sapo", "token", {"positive": (1.0, 0.0), "negative": (1.05, 0.0)}),
                ("sapo", "sequence", {"positive": (2.0, 0.0), "negative": (3.0, 0.0)}),
                ("dppo", "token", {"clip_low": 0.05, "clip_high": 0.1}),
            )
            for clamps in ({}, {"log_ratio_clamp": 0.3})
        ),
        {"objective": "vespo", "positive": (2.0, 3.0), "negative": (3.0, 2.0)},
        {"objective": "dppo", "correction": "tis", "correction_high": 1.1, "clip_low": 0.05},
    )
]


@pytest.mark.parametrize(
    "options", CASES, ids=lambda o: "-".join((o.objective, o.level, o.correction, o.kl, o.kl_gradient))
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_autograd_in_float64(options: PolicyLossOptions, dtype: torch.dtype) -> None:
    batch = sample_batch(dtype)
    loss, by_logprob, by_entropy, sums = run(batch, options)
    expected = expect(batch, options)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for mine, theirs in zip((loss, by_logprob, by_entropy), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=tolerance / 100, rtol=tolerance)
    assert sums["tokens"] == int((batch["weights"] != 0).sum())


def test_logged_sums() -> None:
    batch = sample_batch(torch.float64)
    options = PolicyLossOptions(
        dual_clip=1.5,
        correction="icepop",
        correction_low=0.5,
        correction_high=2.0,
        kl="k3",
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    sums = run(batch, options)[3]
    tokens = batch["weights"] != 0
    cur, old, adv, ref, rollout = (
        batch[name][tokens]
        for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    )
    ratio, drift = (cur - old).exp(), (old - rollout).exp()
    inside = (drift >= 0.5) & (drift <= 2)
    expected = {
        "ratio": ratio.sum(),
        "clipped_low": ((adv < 0) & (ratio < 0.8)).sum(),
        "clipped_high": ((adv > 0) & (ratio > 1.2)).sum(),
        "dual_clipped": ((adv < 0) & (ratio > 1.5)).sum(),
        "old_kl": (ratio - 1 - (cur - old)).sum(),
        "ref_kl": ((ref - cur).exp() - 1 - (ref - cur)).sum(),
        "entropy": batch["entropy"][tokens].sum(),
        "correction_weight": (drift * inside).sum(),
        "corrected": (~inside).sum(),
        "rollout_exp_error": (old - rollout).abs().exp().sum(),
        "rollout_kl": (drift - 1 - drift.log()).sum(),
        "rollout_max_error": (old - rollout).abs().max(),
    }
    assert all(float(expected[name]) > 0 for name in expected)
    for name, value in expected.items():
        assert sums[name] == pytest.approx(float(value), rel=1e-10), name
    parts = sums["policy_loss"] + 0.1 * sums["kl_loss"] - 0.01 * sums["entropy_loss"]
    assert sums["loss"] == pytest.approx(parts, rel=1e-12)


def test_on_policy_gradient_is_minus_the_advantage() -> None:
    batch = sample_batch(torch.float64)
    batch["logprobs"] = batch["old_logprobs"].clone()
    for objective, level in itertools.product(("clip", "cispo"), ("token", "sequence")):
        options = make_options(objective=objective, level=level)
        gradient, sums = run(batch, options)[1], run(batch, options)[3]
        torch.testing.assert_close(gradient, -3 * batch["weights"] * batch["advantages"])
        assert sums["old_kl"] == 0 and sums["ratio"] == sums["tokens"]


def test_masked_tokens_may_hold_anything() -> None:
    options = PolicyLossOptions(level="sequence", correction="sequence_tis", kl="k3", kl_coef=0.1)
    clean = sample_batch(torch.float32)
    dirty = {name: tensor.clone() for name, tensor in clean.items()}
    masked = clean["weights"] == 0
    for name in ("logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "rollout_logprobs"):
        dirty[name][masked] = math.nan
    for mine, theirs in zip(run(clean, options)[:3], run(dirty, options)[:3], strict=True):
        assert torch.equal(mine, theirs)


def test_overflowing_ratios_are_clipped_not_nan() -> None:
    values: dict[str, Any] = {"old_logprobs": torch.tensor([-200.0] * 3), "weights": torch.ones(3)}
    logprobs = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -1.0])
    options = PolicyLossOptions(dual_clip=3.0)
    result = policy_loss(logprobs, advantages=advantages, options=options, **values)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(-1.2 + 3.0)
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0, 0, 0]


def test_gradcheck() -> None:
    batch = sample_batch(torch.float64)
    first = {name: tensor[:20].clone() for name, tensor in batch.items()}
    for options in CASES:
        of_kl, of_objective = options.kl_gradient in ("score", "unbiased"), options.objective
        if of_kl or of_objective in ("cispo", "vespo") or options.level == "sequence":
            continue  # their gradient is not the derivative of their value

        def loss(logprobs: torch.Tensor, entropy: torch.Tensor, options: PolicyLossOptions = options) -> Any:
            arguments = {**first, "logprobs": logprobs, "entropy": entropy}
            return policy_loss(**arguments, options=options, num_sequences=len(LENGTHS)).loss

        torch.autograd.gradcheck(
            loss, (first["logprobs"].requires_grad_(), first["entropy"].requires_grad_())
        )


def test_gspo_gradient_is_the_derivative_where_weights_are_constant() -> None:
    batch = sample_batch(torch.float64)
    first = {name: tensor[:8].clone() for name, tensor in batch.items()}  # sequences 0 and 1
    first["weights"] = torch.full((8,), 0.125, dtype=torch.float64)
    options = PolicyLossOptions(level="sequence", clip_low=5.0, clip_high=5.0)

    def loss(logprobs: torch.Tensor) -> Any:
        return policy_loss(**{**first, "logprobs": logprobs}, options=options, num_sequences=2).loss

    torch.autograd.gradcheck(loss, (first["logprobs"].requires_grad_(),))


def test_opcheck() -> None:
    batch = sample_batch(torch.float32)
    b = {name: tensor[:20].clone() for name, tensor in batch.items()}
    b["logprobs"].requires_grad_()
    arguments = (
        b["logprobs"],
        b["entropy"],
        b["old_logprobs"],
        b["advantages"],
        b["weights"],
        b["ref_logprobs"],
    )
    numbers = PolicyLossOptions(correction_high=2.0, kl_coef=0.1, entropy_coef=0.01).numbers
    options = ("clip", "token", "tis", "geometric_mean", "k3", "plain", numbers)
    torch.library.opcheck(
        torch.ops.megarl.policy_loss.default, (*arguments, b["rollout_logprobs"], None, None, *options)
    )


def test_runs_are_bitwise_equal_whatever_the_number_of_threads() -> None:
    batch = {
        name: torch.cat([tensor] * 5)
        if name != "sequence_ids"
        else torch.arange(5).repeat_interleave(len(tensor))
        for name, tensor in sample_batch(torch.float32).items()
    }
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(batch, CASES[3]))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
        assert results[0][3] == other[3]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {},
            {"objective": "ppo"},
            r"objective must be one of clip, cispo, sapo, dppo, vespo; got 'ppo'",
        ),
        ({}, {"dual_clip": 0.5}, r"policy_loss: dual_clip must be above 1, got 0.5"),
        ({}, {"clip_low": -0.1}, r"policy_loss: clip_low must not be negative, got -0.1"),
        ({"advantages": torch.zeros(3)}, {}, r"policy_loss: advantages must have shape \[1253\], got \[3\]"),
        ({"ref_logprobs": None}, {"kl": "k1"}, r"policy_loss: kl needs ref_logprobs"),
        (
            {"rollout_logprobs": None},
            {"correction": "tis"},
            r"policy_loss: correction needs rollout_logprobs",
        ),
        ({"entropy": None}, {"entropy_coef": 0.1}, r"policy_loss: entropy_coef = 0.1 needs entropy"),
        ({}, {"kl_input_clamp": 0.0}, r"policy_loss: bounds must be above 0, got 0"),
        ({}, {"correction_low": -1.0}, r"policy_loss: correction_low must lie in \[0, inf\], got -1"),
        (
            {},
            {"objective": "dppo", "level": "sequence"},
            r"objective dppo has no level sequence",
        ),
        (
            {"rollout_logprobs": None},
            {"kl": "k3", "kl_gradient": "unbiased_rollout"},
            r"policy_loss: kl_gradient unbiased_rollout needs rollout_logprobs",
        ),
        (
            {"sequence_ids": None},
            {"level": "sequence"},
            r"policy_loss: sequence_ids and num_sequences are needed",
        ),
        (
            {"sequence_ids": torch.full((1253,), 6)},
            {"level": "sequence"},
            r"policy_sequence_sums: sequence_ids\[0\] = 6 is outside the 6 sequences",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    batch = {**sample_batch(torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        policy_loss(**batch, options=PolicyLossOptions(**options), num_sequences=len(LENGTHS))


def test_check_numerics_names_the_row() -> None:
    batch = sample_batch(torch.float32)
    row = int((batch["weights"] != 0).nonzero()[5])
    batch["old_logprobs"][row] = math.nan
    with pytest.raises(FloatingPointError, match=f"megarl::policy_loss: old_logprobs of row {row} is nan"):
        policy_loss(**batch, options=PolicyLossOptions(), check_numerics=True)
