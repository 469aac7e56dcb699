"""policy_loss's CUDA kernels in the SIMT executor against the formulas of megarl/ops/policy_loss.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from tests.simt.executor import Kernels, Read, SimtError, Write

OBJECTIVES = ("clip", "cispo", "sapo", "dppo", "vespo")
CORRECTIONS = (
    "none",
    "tis",
    "icepop",
    "sequence_mask",
    "sequence_tis",
    "sequence_mask_tis",
    "sequence_icepop",
)
ESTIMATORS = ("none", "k1", "k2", "k3")
GRADIENTS = ("plain", "score", "unbiased", "unbiased_old", "unbiased_rollout")
FIELDS = ("logprobs", "entropy", "old_logprobs", "advantages", "weights", "ref_logprobs", "rollout_logprobs")
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("policy_loss_simt.cpp")


@dataclass
class Options:
    objective: str = "clip"
    sequence_level: bool = False
    dual_clip: float = 3.0
    correction: str = "none"
    kl: str = "none"
    gradient: str = "plain"
    clip: tuple[float, float] = (0.2, 0.28)
    band: tuple[float, float] = (0.5, 2.0)
    coefficients: tuple[float, float] = (0.05, 0.01)
    product: bool = False
    token_high: float = np.inf
    log_ratio_clamp: float = np.inf
    kl_clamps: tuple[float, float] = (np.inf, np.inf)
    shape: tuple[float, float, float, float] = (2.0, 3.0, 1.5, 2.0)

    def array(self) -> np.ndarray:
        kl, gradient = ESTIMATORS.index(self.kl), GRADIENTS.index(self.gradient)
        objective, correction = OBJECTIVES.index(self.objective), CORRECTIONS.index(self.correction)
        choices = [objective, self.sequence_level, correction, self.product, kl, gradient]
        numbers = [*self.clip, self.dual_clip, *self.band, self.token_high, self.log_ratio_clamp]
        numbers += [self.coefficients[0], *self.kl_clamps, self.coefficients[1], *self.shape]
        return np.array([*choices, *numbers], np.float64)


class Tokens:
    """Random tokens in sequences of the given lengths; a third of them masked, with NaN for a logprob."""

    def __init__(self, lengths: list[int], dtype: str) -> None:
        rng = np.random.default_rng(len(lengths))
        self.dtype, self.n, self.lengths = dtype, sum(lengths), lengths
        self.fields = {"logprobs": rng.normal(-2, 0.7, self.n)}
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
            self.fields[name] = self.fields["logprobs"] + rng.normal(0, 0.6, self.n)
        self.fields["entropy"] = rng.random(self.n) * 3
        self.fields["advantages"] = np.repeat(rng.normal(size=len(lengths)), lengths)
        self.fields["weights"] = rng.random(self.n) * (rng.random(self.n) < 0.67)
        self.fields["logprobs"][self.fields["weights"] == 0] = np.nan
        self.fields = {name: values.astype(dtype) for name, values in self.fields.items()}
        self.ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.int64)

    def wide(self, name: str) -> np.ndarray:
        return self.fields[name].astype(np.float64)

    def sequence_sums(self, kernels: Kernels, with_rollout: bool = True) -> np.ndarray:
        sums = np.full((len(self.lengths), 3), np.nan)
        reads = [
            Read(self.fields[name], name)
            for name in ("logprobs", "old_logprobs", "rollout_logprobs", "weights")
        ]
        arguments = [*reads, Read(self.ids, "ids"), self.n, len(self.lengths), Write(sums, "sums")]
        if not with_rollout:
            arguments[2] = None
        kernels.run(f"sequence_sums_{self.dtype}", *arguments, seed=3)
        return sums

    def arguments(self, options: Options, sums: np.ndarray | None) -> list:
        return [
            *(Read(self.fields[name], name) for name in FIELDS),
            *(self.n, Read(self.ids, "ids"), None if sums is None else Read(sums, "sums"), len(self.lengths)),
            Read(options.array(), "options"),
        ]

    def forward(
        self, kernels: Kernels, options: Options, sums: np.ndarray | None, seed: int = 0
    ) -> np.ndarray:
        blocks = -(-self.n // 1024)
        partial, counter, out = np.full((blocks, 17), np.nan), np.zeros(1, np.uint32), np.full(17, np.nan)
        outputs = [Write(partial, "partial"), Write(counter, "counter"), Write(out, "out")]
        kernels.run(f"policy_loss_{self.dtype}", *self.arguments(options, sums), *outputs, seed=seed)
        assert counter[0] == 0, "ready for the next launch"
        return out


def sequence_means(tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept = tokens.wide("weights") != 0
    count = np.bincount(tokens.ids, kept, len(tokens.lengths))
    means = []
    for first, second in (("logprobs", "old_logprobs"), ("old_logprobs", "rollout_logprobs")):
        difference = np.where(kept, tokens.wide(first) - tokens.wide(second), 0)
        means.append(np.bincount(tokens.ids, difference, len(tokens.lengths)) / np.maximum(count, 1))
    return means[0], means[1], count


def reference(tokens: Tokens, o: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums [17], gradients by logprob and by entropy [T], by the formulas."""
    kept = tokens.wide("weights") != 0
    log_ratio, log_off, count = sequence_means(tokens)
    cur, entropy, old, a, w, ref, rollout = (tokens.wide(name)[kept] for name in FIELDS)
    ids = tokens.ids[kept]
    bound = o.log_ratio_clamp
    x = log_ratio[ids] if o.sequence_level else cur - old
    if o.objective == "vespo":
        x = np.clip(np.clip((log_ratio * count)[ids], np.log(1e-8), 20), -bound, bound)
    r = np.exp(np.clip(x, -bound, bound))
    moving = np.abs(x) <= bound
    inside = np.clip(r, 1 - o.clip[0], 1 + o.clip[1])
    below, above, dual = r < 1 - o.clip[0], r > 1 + o.clip[1], np.zeros(len(r), bool)
    if o.objective == "cispo":
        value, slope = -a * inside * cur, -a * inside
    elif o.objective == "sapo":
        heat = np.where(a > 0, o.shape[0], o.shape[2])
        gate = 1 / (1 + np.exp(-heat * (r - 1)))
        value, slope = -a * gate * 4 / heat, -a * 4 * gate * (1 - gate) * r * moving
        below = above = np.zeros(len(r), bool)
    elif o.objective == "dppo":
        moved = np.exp(cur) - np.exp(old)
        below, above = (a < 0) & (moved < -o.clip[0]), (a > 0) & (moved > o.clip[1])
        value = np.where(below | above, 0, -a * r)
        slope = value * moving
    elif o.objective == "vespo":
        k, decay = np.where(a < 0, o.shape[2], o.shape[0]), np.where(a < 0, o.shape[3], o.shape[1])
        slope = -a * np.exp(decay + k * x - decay * np.exp(x))
        value = slope * cur
        below = above = np.zeros(len(r), bool)
    else:
        value = np.maximum(-a * r, -a * inside)
        slope = np.where(-a * r >= -a * inside, -a * r, 0) * moving
        below, above = below & (a < 0), above & (a > 0)
        dual = (a < 0) & (r > o.dual_clip)
        value, slope = np.where(dual, np.minimum(value, -a * o.dual_clip), value), np.where(dual, 0, slope)
    off = np.exp(np.clip(old - rollout, -bound, bound))
    by_sequence = np.exp(np.clip((log_off * count if o.product else log_off)[ids], -bound, bound))
    band = (o.band[0] <= off) & (off <= o.band[1])
    sequence_band = (o.band[0] <= by_sequence) & (by_sequence <= o.band[1])
    least = np.minimum(off, o.token_high)
    weight, corrected = {
        "none": (np.ones_like(r), np.zeros(len(r))),
        "tis": (np.clip(off, *o.band), ~band),
        "icepop": (off * band, ~band),
        "sequence_mask": (1.0 * sequence_band, ~sequence_band),
        "sequence_tis": (np.clip(by_sequence, *o.band), ~sequence_band),
        "sequence_mask_tis": (least * sequence_band, ~sequence_band | (off > o.token_high)),
        "sequence_icepop": (by_sequence * sequence_band, ~sequence_band),
    }[o.correction]
    d = np.clip(ref - cur, -o.kl_clamps[0], o.kl_clamps[0])
    kl, kl_slope = {
        "none": (0 * d, 0 * d),
        "k1": (-d, np.ones_like(d)),
        "k2": (d**2 / 2, -d),
        "k3": (np.exp(d) - 1 - d, 1 - np.exp(d)),
    }[o.kl]
    if o.gradient.startswith("unbiased"):
        start = {"unbiased": cur, "unbiased_old": old, "unbiased_rollout": rollout}[o.gradient]
        drawn = np.exp(np.clip(cur - start, -bound, bound))
        kl, kl_slope = drawn * kl, drawn * (kl * (np.abs(cur - start) <= bound) + kl_slope)
    kl_slope = kl_slope * (np.abs(ref - cur) <= o.kl_clamps[0]) * (np.abs(kl) <= o.kl_clamps[1])
    kl = np.clip(kl, -o.kl_clamps[1], o.kl_clamps[1])
    if o.gradient == "score" and o.kl != "none":
        kl_slope = cur - ref
    beta, eta = o.coefficients
    k3 = lambda x: np.exp(x) - 1 - x  # noqa: E731
    rows = [w * (weight * value + beta * kl - eta * entropy), w * weight * value, w * kl, w * entropy]
    rows += [np.ones_like(r), r, below, above, dual, k3(cur - old), kl, entropy, weight, corrected]
    rows += [np.exp(np.abs(old - rollout)), k3(old - rollout)]
    sums = np.array([*(np.sum(row) for row in rows), np.abs(old - rollout).max(initial=0)])
    grads = np.zeros((2, tokens.n))
    grads[0, kept], grads[1, kept] = w * (weight * slope + beta * kl_slope), -w * eta
    return sums, grads[0], grads[1]


def check(kernels: Kernels, tokens: Tokens, options: Options) -> None:
    sums = tokens.sequence_sums(kernels)
    expected, by_logprob, by_entropy = reference(tokens, options)
    actual = tokens.forward(kernels, options, sums, seed=5)
    tolerance = TOLERANCE[tokens.dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(tokens.n, 1))
    grad_loss = np.full(1, -0.7, tokens.dtype)
    grads = np.full((2, tokens.n), np.nan, tokens.dtype)
    outputs = [Read(grad_loss), Write(grads[0], "grad"), Write(grads[1], "grad_entropy")]
    kernels.run(f"policy_loss_backward_{tokens.dtype}", *tokens.arguments(options, sums), *outputs)
    np.testing.assert_allclose(grads[0], -0.7 * by_logprob, rtol=tolerance, atol=5 * tolerance)
    np.testing.assert_allclose(grads[1], -0.7 * by_entropy, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_option(kernels: Kernels, objective: str, correction: str, dtype: str) -> None:
    tokens = Tokens([300, 1, 17, 90, 250, 5], dtype)
    levels = (False, True) if objective in ("clip", "cispo", "sapo") else (False,)
    for kl, gradient, sequence_level in itertools.product(("none", "k3"), GRADIENTS[:2], levels):
        check(kernels, tokens, Options(objective, sequence_level, 1.5, correction, kl, gradient))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kl", ESTIMATORS[1:])
def test_every_kl(kernels: Kernels, kl: str, gradient: str, dtype: str) -> None:
    tokens = Tokens([300, 1, 17, 90, 250, 5], dtype)
    check(kernels, tokens, Options(kl=kl, gradient=gradient))
    check(kernels, tokens, Options(kl=kl, gradient=gradient, kl_clamps=(0.9, 0.3), log_ratio_clamp=0.4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("correction", CORRECTIONS[3:])
def test_products_and_bounds(kernels: Kernels, correction: str, dtype: str) -> None:
    tokens = Tokens([3, 1, 17, 9, 2, 5], dtype)
    for objective in OBJECTIVES:
        changed = {"product": True, "token_high": 1.2, "log_ratio_clamp": 0.7}
        check(kernels, tokens, Options(objective, correction=correction, **changed))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [[1], [0, 255, 1, 0], [256, 256, 512], [1025], [700, 3000, 1396]])
def test_lengths_around_a_block(kernels: Kernels, lengths: list[int], dtype: str) -> None:
    check(kernels, Tokens(lengths, dtype), Options(correction="sequence_tis", kl="k3", sequence_level=True))


def test_sequence_sums(kernels: Kernels) -> None:
    for lengths in ([5], [0, 3, 0, 700, 1], [256, 257]):
        tokens = Tokens(lengths, "float64")
        means = np.stack(sequence_means(tokens))
        expected = np.stack([means[0] * means[2], means[1] * means[2], means[2]], axis=1)
        np.testing.assert_allclose(tokens.sequence_sums(kernels), expected, rtol=1e-12, atol=1e-12)
        assert (tokens.sequence_sums(kernels, with_rollout=False)[:, 1] == 0).all()


def test_sums_are_equal_bit_by_bit_in_any_order_of_blocks_and_threads(kernels: Kernels) -> None:
    tokens, options = Tokens([5000, 3000], "float32"), Options(kl="k2", correction="tis")
    first, *others = (tokens.forward(kernels, options, None, seed) for seed in range(4))
    assert all(np.array_equal(first, other) for other in others)


def test_nan_reaches_the_maximum(kernels: Kernels) -> None:
    tokens = Tokens([3000], "float32")
    position = int(np.flatnonzero(tokens.fields["weights"])[100])
    tokens.fields["rollout_logprobs"][position] = np.nan
    sums = tokens.forward(kernels, Options(), None)
    assert np.isnan(sums[16])
    assert np.isfinite(sums[:14]).all()


@pytest.mark.parametrize("ids", [[0, 0, 1, 3], [0, 1, 0, 2], [-1, 0, 1, 2], [1, 1, 0, 2]])
def test_wrong_sequence_ids_stop_the_kernel(kernels: Kernels, ids: list[int]) -> None:
    tokens = Tokens([2, 1, 1], "float32")
    tokens.ids = np.array(ids, np.int64)
    with pytest.raises(SimtError, match="sequence_ids is outside the sequences, or does not ascend"):
        tokens.sequence_sums(kernels)
    tokens.fields["weights"][:] = 1
    if max(ids) > 2 or min(ids) < 0:
        with pytest.raises(SimtError, match="sequence_ids is outside the sequences"):
            tokens.forward(kernels, Options(sequence_level=True), np.ones((3, 3)))
