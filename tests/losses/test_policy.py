"""PolicyLoss as configured, against its formulas written out token by token in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch

from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.losses.base import LossResult, LossTokens
from megarl.losses.custom import configured_loss
from megarl.losses.policy import PolicyLoss, options_of
from megarl.ops import NumericsError

SLOTS = [0] * 30 + [1] * 3 + [2] * 60 + [3] * 27
COUNT = len(SLOTS)


def make_loss(**algorithm: Any) -> PolicyLoss:
    return PolicyLoss(options_of(GrpoAlgorithmConfig(**algorithm)))


def make_tokens(cur: list[float], **fields: Any) -> LossTokens:
    count = len(cur)
    dtype = fields.pop("dtype", torch.float32)
    values: dict[str, Any] = {
        "weights": [1.0 / max(count, 1)] * count,
        "entropy": [0.0] * count,
        "advantages": [1.0] * count,
        "old_logprobs": None,
        "ref_logprobs": None,
        "rollout_logprobs": None,
    } | fields
    tensors = {name: None if v is None else torch.tensor(v, dtype=dtype) for name, v in values.items()}
    tensors["entropy"].requires_grad_()
    return LossTokens(
        logprobs=torch.tensor(cur, dtype=dtype, requires_grad=True),
        labels=torch.zeros(count, dtype=torch.int64),
        sequence_ids=torch.zeros(count, dtype=torch.int64),
        slots=torch.tensor(SLOTS[:count], dtype=torch.int64),
        num_slots=4,
        **tensors,  # type: ignore[arg-type]
    )


def noisy_tokens(dtype: torch.dtype) -> LossTokens:
    """Ratios far below, inside and far above any clip, advantages of both signs and none, drift."""
    torch.manual_seed(0)
    cur = torch.randn(COUNT) - 3
    bias = torch.tensor([0.3, -0.4, 0.02, -0.1])[torch.tensor(SLOTS)]
    advantages = torch.randn(COUNT)
    advantages[::17] = 0
    old = cur - bias - 0.4 * torch.randn(COUNT)
    fields = {
        "old_logprobs": old,
        "ref_logprobs": cur + 0.8 * torch.randn(COUNT),
        "rollout_logprobs": old + bias.flip(0) + 0.3 * torch.randn(COUNT),
        "advantages": advantages,
        "weights": torch.rand(COUNT) / COUNT,
        "entropy": torch.rand(COUNT),
    }
    return make_tokens(cur.tolist(), dtype=dtype, **{name: v.tolist() for name, v in fields.items()})


class ByHand(NamedTuple):
    """One token: its policy loss and KL, gradients of the whole loss, and metrics."""

    policy: float
    kl: float
    by_logprob: float
    by_entropy: float
    ratio: float
    k3_old: float
    clipped: bool
    dual: bool
    weight: float
    corrected: bool


def sequence_means(values: list[float]) -> list[float]:
    means = []
    for slot in SLOTS:
        own = [v for v, s in zip(values, SLOTS, strict=True) if s == slot]
        means.append(sum(own) / len(own))
    return means


def off_policy(drift: float, c: GrpoAlgorithmConfig) -> tuple[float, bool]:
    ratio = math.exp(drift)
    low, high = c.off_policy_low or 0.0, c.off_policy_high or 0.0
    match c.off_policy_correction:
        case "tis" | "sequence_tis":
            return min(max(ratio, low), high), not low <= ratio <= high
        case "icepop" | "sequence_icepop":
            return (ratio if low <= ratio <= high else 0.0), not low <= ratio <= high
        case "sequence_mask":
            return float(low <= ratio <= high), not low <= ratio <= high
    return 1.0, False


def by_hand(tokens: LossTokens, c: GrpoAlgorithmConfig) -> list[ByHand]:
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages")
    cur, old, ref, rollout, advantages = (getattr(tokens, name).tolist() for name in names)
    log_ratios = [a - b for a, b in zip(cur, old, strict=True)]
    drifts = [a - b for a, b in zip(old, rollout, strict=True)]
    token_log_ratios = log_ratios
    if c.ratio_level == "sequence":
        log_ratios = sequence_means(log_ratios)
    elif c.objective == "vespo":
        means = sequence_means(log_ratios)
        log_ratios = [mean * SLOTS.count(slot) for mean, slot in zip(means, SLOTS, strict=True)]
        log_ratios = [min(max(total, math.log(1e-8)), 20) for total in log_ratios]
    of_tokens = [math.exp(drift) for drift in drifts]
    if c.off_policy_correction.startswith("sequence"):
        drifts = sequence_means(drifts)
        if c.off_policy_sequence_weight == "product":
            drifts = [drift * SLOTS.count(slot) for drift, slot in zip(drifts, SLOTS, strict=True)]
    result = []
    for i, a in enumerate(advantages):
        ratio = math.exp(log_ratios[i])
        low, high = 1 - c.clip_low, 1 + c.clip_high
        dual = False
        if c.objective == "sapo":
            heat = c.sapo_temperature_pos if a > 0 else c.sapo_temperature_neg
            gate, clipped = 1 / (1 + math.exp(-heat * (ratio - 1))), False
            policy, gradient = -a * 4 / heat * gate, -a * 4 * gate * (1 - gate) * ratio
        elif c.objective == "dppo":
            moved = math.exp(cur[i]) - math.exp(old[i])
            clipped = (a > 0 and moved > c.clip_high) or (a < 0 and -moved > c.clip_low)
            policy = gradient = 0.0 if clipped else -a * ratio
        elif c.objective == "vespo":
            clipped, good = False, a >= 0
            k = c.vespo_k_pos if good else c.vespo_k_neg
            decay = c.vespo_lambda_pos if good else c.vespo_lambda_neg
            gradient = -a * ratio**k * math.exp(decay * (1 - ratio))
            policy = gradient * cur[i]
        elif c.objective == "cispo":
            clipped = a != 0 and not low <= ratio <= high
            gradient = -a * min(max(ratio, low), high)
            policy = gradient * cur[i]
        else:
            clipped = (a > 0 and ratio > high) or (a < 0 and ratio < low)
            policy = max(-a * ratio, -a * min(max(ratio, low), high))
            gradient = 0.0 if clipped else -a * ratio
            if a < 0 and c.dual_clip is not None and policy > -a * c.dual_clip:
                dual, policy, gradient = True, -a * c.dual_clip, 0.0
        weight, corrected = off_policy(drifts[i], c)
        if c.off_policy_correction == "sequence_mask_tis":
            most = c.off_policy_token_high or math.inf
            inside = (c.off_policy_low or 0) <= math.exp(drifts[i]) <= (c.off_policy_high or 0)
            weight, corrected = inside * min(of_tokens[i], most), not inside or of_tokens[i] > most
        d = ref[i] - cur[i]
        kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[c.kl_estimator]
        slope = {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}[c.kl_estimator]
        if c.kl_gradient == "score":
            slope = cur[i] - ref[i]
        elif c.kl_gradient != "plain":
            start = {"unbiased_old": old[i], "unbiased_rollout": rollout[i]}.get(c.kl_gradient, cur[i])
            kl, slope = (math.exp(cur[i] - start) * each for each in (kl, kl + slope))
        k3_old = math.exp(token_log_ratios[i]) - 1 - token_log_ratios[i]
        moved = token_log_ratios[i]
        whole = weight * gradient + c.kl_coef * slope + 2 * c.drift_coef * moved
        result.append(
            ByHand(
                weight * policy, kl, whole, -c.entropy_coef, ratio, k3_old, clipped, dual, weight, corrected
            )
        )
    return result


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "clip_higher": {"clip_low": 0.1, "clip_high": 0.28},
    "dual_clip": {"dual_clip": 1.3},
    "cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "gspo_cispo": {"ratio_level": "sequence", "objective": "cispo", "clip_high": 0.04},
    "sapo": {"objective": "sapo"},
    "sapo_sequence": {"objective": "sapo", "ratio_level": "sequence", "sapo_temperature_neg": 3.0},
    "dppo": {"objective": "dppo", "clip_low": 0.02, "clip_high": 0.03, "drift_coef": 0.3},
    "vespo": {"objective": "vespo", "vespo_lambda_neg": 1.5},
    "tis": {"off_policy_correction": "tis", "off_policy_high": 1.1},
    "icepop": {"off_policy_correction": "icepop", "off_policy_low": 0.8, "off_policy_high": 1.2},
    "sequence_mask": {
        "off_policy_correction": "sequence_mask",
        "off_policy_low": 0.9,
        "off_policy_high": 1.15,
    },
    "sequence_tis": {"off_policy_correction": "sequence_tis", "off_policy_high": 1.05},
    "tis_low": {"off_policy_correction": "tis", "off_policy_low": 0.95, "off_policy_high": 1.1},
    "sequence_tis_product": {
        "off_policy_correction": "sequence_tis",
        "off_policy_sequence_weight": "product",
        "off_policy_high": 2.0,
    },
    "sequence_mask_tis": {
        "off_policy_correction": "sequence_mask_tis",
        "off_policy_low": 0.9,
        "off_policy_high": 1.5,
    },
    "sequence_mask_tis_truncated": {
        "off_policy_correction": "sequence_mask_tis",
        "off_policy_low": 0.5,
        "off_policy_high": 1.5,
        "off_policy_token_high": 1.2,
    },
    "sequence_icepop": {
        "off_policy_correction": "sequence_icepop",
        "off_policy_sequence_weight": "product",
        "off_policy_low": 0.1,
        "off_policy_high": 100.0,
    },
    "k1_unbiased": {"kl_coef": 0.7, "kl_estimator": "k1", "kl_gradient": "unbiased"},
    "k2_unbiased_old": {"kl_coef": 0.7, "kl_estimator": "k2", "kl_gradient": "unbiased_old"},
    "k3_unbiased_rollout": {"kl_coef": 0.7, "kl_gradient": "unbiased_rollout"},
    "k1_score": {"kl_coef": 0.7, "kl_estimator": "k1", "kl_gradient": "score"},
    "k2": {"kl_coef": 0.7, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.7},
    "k3_score": {"kl_coef": 0.7, "kl_gradient": "score"},
    "entropy": {"entropy_coef": 0.05},
    "everything": {
        "ratio_level": "sequence",
        "clip_low": 0.03,
        "dual_clip": 1.3,
        "off_policy_correction": "icepop",
        "off_policy_low": 0.7,
        "off_policy_high": 1.4,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_every_option_by_hand(case: str, dtype: torch.dtype) -> None:
    config = GrpoAlgorithmConfig(**CASES[case])
    tokens = noisy_tokens(dtype)
    expected = by_hand(tokens, config)
    weights = tokens.weights.tolist()
    result = configured_loss(config, check_numerics=False)(tokens)
    rel = 1e-12 if dtype == torch.float64 else 4e-6

    def mean(values: list[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True))

    policy, entropy = mean([t.policy for t in expected]), mean(tokens.entropy.tolist())
    kl = mean([t.kl for t in expected])
    sums = {
        "loss": policy + config.kl_coef * kl - config.entropy_coef * entropy,
        "policy_loss": policy,
        "advantage_mean": mean(tokens.advantages.tolist()),  # type: ignore[union-attr]
        "entropy": entropy,
        "weight": sum(weights),
    }
    token_sums = {
        "tokens": float(COUNT),
        "ratio_mean": sum(t.ratio for t in expected),
        "kl_policy": sum(t.k3_old for t in expected),
        "clip_fraction": float(sum(t.clipped for t in expected)),
    }
    if config.kl_coef:
        sums["kl_ref"] = kl
    if config.drift_coef:
        moves = zip(tokens.logprobs.tolist(), tokens.old_logprobs.tolist(), strict=True)  # type: ignore[union-attr]
        sums["drift"] = mean([(a - b) ** 2 for a, b in moves])
        sums["loss"] += config.drift_coef * sums["drift"]
    if config.dual_clip:
        token_sums["dual_clip_fraction"] = float(sum(t.dual for t in expected))
        assert token_sums["dual_clip_fraction"] > 0
    if config.off_policy_correction != "none":
        token_sums["correction_weight_mean"] = sum(t.weight for t in expected)
        token_sums["corrected_fraction"] = float(sum(t.corrected for t in expected))
        assert 0 < token_sums["corrected_fraction"] < COUNT
    if config.objective not in ("sapo", "vespo"):
        assert 10 < token_sums["clip_fraction"] < COUNT - 10, "the case covers what clips and what does not"
    assert numbers(result.sums) == pytest.approx(sums, rel=rel, abs=1e-8)
    assert numbers(result.token_sums) == pytest.approx(token_sums, rel=rel)
    assert numbers(result.maxima) == pytest.approx({"ratio_max": max(t.ratio for t in expected)}, rel=rel)
    assert float(result.loss.detach()) == pytest.approx(sums["loss"], rel=rel, abs=1e-8)
    assert not any(v.requires_grad for v in (result.sums | result.token_sums | result.maxima).values())

    by_logprob, by_entropy = torch.autograd.grad(
        result.loss, (tokens.logprobs, tokens.entropy), allow_unused=True
    )
    gradients = [w * t.by_logprob for w, t in zip(weights, expected, strict=True)]
    assert by_logprob.tolist() == pytest.approx(gradients, rel=5 * rel, abs=rel / 100)
    if config.entropy_coef:
        gradients = [w * t.by_entropy for w, t in zip(weights, expected, strict=True)]
        assert by_entropy.tolist() == pytest.approx(gradients, rel=rel)
    else:
        assert by_entropy is None


def numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def test_the_default_is_the_clipped_loss_of_plain_torch() -> None:
    """The formula that MegaRL's loss was before it became an op, in its own precision."""
    tokens = noisy_tokens(torch.float32)
    assert tokens.advantages is not None and tokens.old_logprobs is not None
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    plain = (tokens.weights * torch.maximum(-tokens.advantages * ratio, -tokens.advantages * clipped)).sum()
    [by_plain] = torch.autograd.grad(plain, tokens.logprobs)
    result = make_loss()(tokens)
    [by_op] = torch.autograd.grad(result.loss, tokens.logprobs)
    torch.testing.assert_close(result.loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_op, by_plain, rtol=1e-6, atol=0)


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
    result = make_loss(clip_high=0.3)(tokens)
    result.loss.backward()
    assert tokens.logprobs.grad is not None
    assert float(result.loss.detach()) == pytest.approx(loss, abs=1e-6)
    assert tokens.logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert float(result.token_sums["clip_fraction"]) == clipped
    assert "kl_ref" not in result.sums


@pytest.mark.parametrize("algorithm", [{}, {"ratio_level": "sequence"}, {"objective": "cispo"}])
def test_on_policy_the_ratio_is_exactly_one(algorithm: dict[str, Any]) -> None:
    torch.manual_seed(0)
    advantages = torch.randn(64)
    tokens = make_tokens((torch.randn(64) * 3).tolist(), advantages=advantages.tolist())
    result = make_loss(**algorithm)(tokens)
    assert float(result.maxima["ratio_max"]) == 1.0
    assert float(result.token_sums["ratio_mean"]) == 64.0 == float(result.token_sums["tokens"])
    assert float(result.token_sums["kl_policy"]) == 0.0
    assert float(result.token_sums["clip_fraction"]) == 0.0
    [gradient] = torch.autograd.grad(result.loss, tokens.logprobs)
    assert torch.equal(gradient, -advantages / 64)


def kl_only(cur: torch.Tensor, ref: torch.Tensor, weights: torch.Tensor, **algorithm: Any) -> LossResult:
    tokens = make_tokens([0.0] * len(cur), advantages=[0.0] * len(cur), dtype=torch.float64)
    tokens = dataclasses.replace(tokens, logprobs=cur, ref_logprobs=ref, weights=weights)
    return make_loss(kl_coef=1.0, **algorithm)(tokens)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_plain_kl_gradients_by_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    cur = torch.randn(32, dtype=torch.float64, requires_grad=True)
    ref, weights = torch.randn(32, dtype=torch.float64), torch.rand(32, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: kl_only(c, ref, weights, kl_estimator=kind).loss, (cur,))


def test_estimators_and_their_gradients_against_the_divergence() -> None:
    """Summed over a vocabulary with the policy's own probabilities the estimates are KL(cur || ref), and the
    score gradient of any of them is that divergence's gradient by the logits.
    """
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    ref = (logits + 0.05 * torch.randn(50, dtype=torch.float64)).detach().log_softmax(0)
    cur = logits.log_softmax(0)
    exact = (cur.exp() * (cur - ref)).sum()
    [true] = torch.autograd.grad(exact, logits, retain_graph=True)
    for kind, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.05)):
        result = kl_only(cur, ref, cur.detach().exp(), kl_estimator=kind, kl_gradient="score")
        assert float(result.sums["kl_ref"]) == pytest.approx(exact.item(), rel=tolerance)
        [gradient] = torch.autograd.grad(result.loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, true, rtol=1e-9, atol=1e-12)
    # why k1 with its plain gradient is refused: whatever the reference, it pulls nowhere
    result = kl_only(cur, ref, cur.detach().exp(), kl_estimator="k1")
    [gradient] = torch.autograd.grad(result.loss, logits)
    assert gradient.abs().max() < 1e-12 < true.abs().max()


def test_likelihood_of_positive_examples_is_added_with_its_own_mean() -> None:
    tokens = noisy_tokens(torch.float64)
    shares = [0.0] * 33 + [1 / 60] * 60 + [0.0] * 27
    tokens = dataclasses.replace(tokens, nll_weights=torch.tensor(shares, dtype=torch.float64))
    config = GrpoAlgorithmConfig()
    plain = PolicyLoss(options_of(config))(tokens)
    result = PolicyLoss(options_of(config), nll_coef=0.3)(tokens)
    nll = -sum(tokens.logprobs.tolist()[33:93]) / 60
    assert float(result.sums["nll_positive"]) == pytest.approx(nll, rel=1e-12)
    for with_term, without in ((result.loss, plain.loss), (result.sums["loss"], plain.sums["loss"])):
        assert float(with_term.detach()) == pytest.approx(float(without.detach()) + 0.3 * nll, rel=1e-12)
    [ours] = torch.autograd.grad(result.loss, tokens.logprobs)
    [theirs] = torch.autograd.grad(plain.loss, tokens.logprobs)
    assert (ours - theirs).tolist() == pytest.approx([-0.3 * share for share in shares], abs=1e-15)


def test_no_tokens_at_all() -> None:
    """A context-parallel rank may hold none of a microbatch's responses."""
    result = make_loss(ratio_level="sequence")(make_tokens([]))
    result.loss.backward()
    assert float(result.loss.detach()) == 0 and result.maxima == {}
    assert float(result.token_sums["tokens"]) == 0


@pytest.mark.parametrize("field", ["old_logprobs", "advantages", "logprobs"])
def test_check_numerics_names_the_row(field: str) -> None:
    tokens = noisy_tokens(torch.float32)
    getattr(tokens, field).data[7] = math.nan
    options = options_of(GrpoAlgorithmConfig())
    with pytest.raises(NumericsError, match=f"megarl::policy_loss: {field} of row 7 is nan") as error:
        PolicyLoss(options, check_numerics=True)(tokens)
    assert error.value.row == 7
    PolicyLoss(options)(tokens)


def test_a_clamp_bounds_the_value_and_stops_the_gradient() -> None:
    """As torch.clamp does: NeMo RL's and verl's clamps of the KL, verl's of the ratio."""
    cur, ref = [-1.0, -9.0, -1.0, -1.0], [-1.5, -1.0, -40.0, -1.0]
    fields = {"ref_logprobs": ref, "advantages": [0.0, 0.0, 0.0, -1.0], "dtype": torch.float64}
    tokens = make_tokens(cur, old_logprobs=[-1.0, -9.0, -1.0, -31.0], **fields)
    clamps = {"kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0, "log_ratio_clamp": 20.0}
    result = make_loss(kl_coef=1.0, clip_high=1e9, **clamps)(tokens)
    result.loss.backward()
    kl = [math.exp(-0.5) - 0.5, 10.0, 10.0, 0.0]  # of d = -0.5, 8 (2,972), -20 (19), 0
    assert float(result.sums["kl_ref"]) == pytest.approx(sum(kl) / 4, rel=1e-12)
    assert float(result.sums["policy_loss"]) == pytest.approx(math.exp(20) / 4, rel=1e-12)
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad.tolist() == pytest.approx([(1 - math.exp(-0.5)) / 4, 0, 0, 0], rel=1e-12)


def test_the_unbiased_gradient_is_that_of_the_expectation() -> None:
    """Over a whole vocabulary: sum_j p_j (k_j + k_j') d log p_j is the gradient of sum_j p_j k_j."""
    torch.manual_seed(1)
    logits = torch.randn(40, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(40, dtype=torch.float64).log_softmax(0)
    cur = logits.log_softmax(0)
    estimates = {"k1": cur - ref, "k2": (cur - ref) ** 2 / 2, "k3": (ref - cur).exp() - 1 - (ref - cur)}
    for kind, estimate in estimates.items():
        [true] = torch.autograd.grad((cur.exp() * estimate).sum(), logits, retain_graph=True)
        result = kl_only(cur, ref, cur.detach().exp(), kl_estimator=kind, kl_gradient="unbiased")
        [gradient] = torch.autograd.grad(result.loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, true, rtol=1e-9, atol=1e-12)
