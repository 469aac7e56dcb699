"""What is drawn from given logits, against the definition written another way, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.inference.hf.sampler import draw, uniforms
from megarl.inference.interface import SamplingConfig

ALMOST_ONE = 1 - 2.0**-53


def kept_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """[V] float64 of one row: sort, keep, renormalise."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    kept = np.zeros(len(weights), bool)
    kept[order[: top_k or len(order)]] = True
    shares = weights * kept / (weights * kept).sum()
    before = np.cumsum(shares[order]) - shares[order]
    kept[order[before >= top_p]] = False
    return weights * kept / (weights * kept).sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 20, 1.0), (1.3, 0, 0.8), (0.9, 50, 0.7)],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_k: int, top_p: float) -> None:
    draws = 40_000
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2
    sampling = SamplingConfig(temperature, (), True, top_k, top_p)
    expected = kept_probabilities(logits.numpy(), temperature, top_k, top_p)
    noise = uniforms(list(range(draws)), [7] * draws)
    tokens, logprobs = draw(logits.expand(draws, -1), sampling, noise)
    counts = np.bincount(tokens.numpy(), minlength=300)
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi_square = (((counts - draws * expected)[seen]) ** 2 / (draws * expected[seen])).sum()
    degrees = seen.sum() - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    np.testing.assert_allclose(logprobs.numpy(), np.log(expected[tokens.numpy()]), atol=2e-6)


def test_noise_is_inverted_exactly() -> None:
    """The cumulative probability up to the token reaches beyond the noise, that before it does not."""
    logits = torch.randn(64, 1003, generator=torch.Generator().manual_seed(2)).double().float()
    noise = uniforms([5] * 64, list(range(64)))
    tokens, _ = draw(logits, SamplingConfig(1.0, (), True), noise)
    weights = np.exp(logits.numpy().astype(np.float64))
    upto = np.cumsum(weights / weights.sum(-1, keepdims=True), -1)
    wanted = [int(np.searchsorted(row, u, side="right")) for row, u in zip(upto, noise, strict=True)]
    assert tokens.tolist() == wanted


@pytest.mark.parametrize("size", [4, 256, 257, 700])
@pytest.mark.parametrize("noise", [0.0, 0.5, ALMOST_ONE])
def test_a_token_that_was_cut_off_is_never_drawn(size: int, noise: float) -> None:
    logits = torch.full((1, size), -50.0)
    logits[0, 1], logits[0, -2] = 3.0, 2.5
    sampling = SamplingConfig(1.0, (), True, top_k=2)
    tokens, logprobs = draw(logits, sampling, np.array([noise]))
    assert tokens.item() in (1, size - 2)
    assert torch.isfinite(logprobs).all()


def test_greedy_takes_the_largest_and_reports_its_plain_logprob() -> None:
    logits = torch.randn(5, 90, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = draw(logits, SamplingConfig(0.0, (), True, top_k=3, top_p=0.1), np.zeros(5))
    assert tokens.tolist() == logits.numpy().argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1).amax(-1).float())


def test_noise_is_uniform_and_of_each_seed_and_position_its_own() -> None:
    numbers = np.stack([uniforms(list(range(500)), [position] * 500) for position in range(100)])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    counts = np.bincount((numbers * 64).astype(int).ravel(), minlength=64)
    assert abs(((counts - numbers.size / 64) ** 2 / (numbers.size / 64)).sum() - 63) < 5 * np.sqrt(126)
    for one, other in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):  # positions, seeds
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert uniforms([-1, 2**64 - 1], [0, 0])[0] == uniforms([2**64 - 1], [0])[0]


def test_logits_that_are_not_numbers_give_some_token() -> None:
    logits = torch.full((2, 300), torch.nan)
    tokens, logprobs = draw(logits, SamplingConfig(1.0, (), True), np.array([0.1, 0.9]))
    assert ((tokens >= 0) & (tokens < 300)).all() and logprobs.isnan().all()
