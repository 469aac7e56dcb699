"""Preference losses against closed forms by hand, and their gradients against finite differences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megarl.losses.base import LossTokens
from megarl.losses.preference import (
    PreferenceLoss,
    PreferenceOptions,
    Responses,
    num_targets,
    pair_values,
)
from megarl.records import TokenSequence, TrainBatch

# Two pairs: summed logprobs, tokens, reference's logprobs of the chosen and of the rejected response.
CHOSEN = ([-6.0, -20.0], [4, 10], [-7.5, -19.0])
REJECTED = ([-9.0, -3.5], [3, 7], [-8.0, -3.0])
RHO_CHOSEN, RHO_REJECTED = [1.5, -1.0], [-1.0, -0.5]


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean_logprob: float) -> float:
    p = math.exp(mean_logprob)
    return math.log(p / (1 - p))


def by_hand(options: PreferenceOptions, pair: int, kl: float) -> tuple[float, float, float]:
    """Return loss and rewards of one pair, in the papers' notation, with plain floats."""
    b = options.beta
    chosen, rejected = RHO_CHOSEN[pair], RHO_REJECTED[pair]
    if options.length_normalization:
        chosen, rejected = chosen / CHOSEN[1][pair], rejected / REJECTED[1][pair]
    if options.loss in ("simpo", "orpo"):
        chosen, rejected = CHOSEN[0][pair] / CHOSEN[1][pair], REJECTED[0][pair] / REJECTED[1][pair]
    if options.loss == "ipo":
        loss = (chosen - rejected - 1 / (2 * b)) ** 2
    elif options.loss == "kto":
        desirable = options.desirable_weight * (1 - sigma(b * (chosen - kl)))
        loss = (desirable + options.undesirable_weight * (1 - sigma(b * (kl - rejected)))) / 2
    elif options.loss == "orpo":
        loss = -b * log_sigma(odds(chosen) - odds(rejected))
    else:
        x = b * (chosen - rejected) - options.simpo_gamma
        loss = -(1 - options.label_smoothing) * log_sigma(x) - options.label_smoothing * log_sigma(-x)
    return loss, b * chosen, b * rejected


CASES = {
    "dpo": PreferenceOptions("dpo", 0.3),
    "dpo-smoothed": PreferenceOptions("dpo", 0.3, label_smoothing=0.1),
    "dpo-normalized": PreferenceOptions("dpo", 2.0, length_normalization=True),
    "ipo": PreferenceOptions("ipo", 0.2),
    "ipo-normalized": PreferenceOptions("ipo", 0.2, length_normalization=True),
    "kto": PreferenceOptions("kto", 0.4, desirable_weight=1.3, undesirable_weight=0.7),
    "simpo": PreferenceOptions("simpo", 2.0, simpo_gamma=0.6),
    "simpo-smoothed": PreferenceOptions("simpo", 2.0, simpo_gamma=0.6, label_smoothing=0.2),
    "orpo": PreferenceOptions("orpo", 0.5),
}


def responses(side: tuple[list[float], list[int], list[float]], options: PreferenceOptions) -> Responses:
    logps, counts, refs = (torch.tensor(part, dtype=torch.float64) for part in side)
    return Responses(logps, counts, None if options.loss in ("simpo", "orpo") else refs)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_rewards_by_hand(name: str) -> None:
    options, kl = CASES[name], 0.25 if CASES[name].loss == "kto" else 0.0
    values = pair_values(options, responses(CHOSEN, options), responses(REJECTED, options), kl)
    for pair in range(2):
        expected = by_hand(options, pair, kl)
        found = [float(field[pair]) for field in values]
        assert found == pytest.approx(list(expected), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_pairs(name: str) -> None:
    options = CASES[name]
    chosen, rejected = responses(CHOSEN, options), responses(REJECTED, options)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pair_values(options, chosen._replace(logps=a), rejected._replace(logps=b), 0.25).loss

    inputs = (chosen.logps.clone().requires_grad_(), rejected.logps.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    values = pair_values(options, chosen._replace(logps=inputs[0]), rejected, 0.25)
    assert not values.reward_chosen.requires_grad


def test_the_odds_are_exact_at_both_ends() -> None:
    """Mean probabilities of e^-1e-9 and e^-60: 1 - p and p are lost in a naive log(p / (1 - p))."""
    options = PreferenceOptions("orpo", 1.0)
    one, count = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    logits = 1e-9, 60.0
    chosen, rejected = (Responses(-x * one, count, None) for x in logits)
    margin = (-1e-9 - math.log(-math.expm1(-1e-9))) - (-60.0)
    flipped = pair_values(options, rejected, chosen).loss
    assert float(flipped) == pytest.approx(margin, rel=1e-12)


# --- through a packed microbatch ----------------------------------------------------------------------

SEQUENCES = TrainBatch.of(
    [
        TokenSequence([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),
        TokenSequence([1, 2, 6, 7], [0, 0, 1, 1]),
        TokenSequence([9, 8, 7, 6, 5, 4], [0, 1, 1, 0, 1, 1]),
        TokenSequence([9, 5], [0, 1]),
    ]
)
REFS = torch.tensor([-3.0, -2.5, -6.0, -0.5], dtype=torch.float64)
COUNTS = [3, 2, 4, 1]


def tokens_of(logprobs: torch.Tensor, which: list[int]) -> LossTokens:
    """Return LossTokens of a microbatch of the sequences ``which``; logprobs of all targets, end to end."""
    parts = logprobs.split(COUNTS)
    chosen = torch.cat([parts[i] for i in which])
    slots = torch.cat([torch.full((COUNTS[i],), slot) for slot, i in enumerate(which)])
    ids = torch.tensor(which)
    empty = torch.zeros(len(chosen))
    return LossTokens(
        chosen,
        empty + 2.0,
        empty,
        empty.long(),
        ids[slots],
        None,
        None,
        None,
        None,
        slots=slots,
        num_slots=len(which),
        slot_ids=ids,
    )


def dummy(logprobs: torch.Tensor) -> LossTokens:
    none, ints = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    last = {"slots": ints, "num_slots": 1, "slot_ids": torch.tensor([-1])}
    return LossTokens(logprobs[:0], none, none, ints, ints, None, None, None, None, **last)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
def test_a_step_is_the_mean_over_pairs_however_it_is_split(name: str, sft_coef: float) -> None:
    options = dataclasses.replace(CASES[name], sft_coef=sft_coef)
    needs_reference = options.loss not in ("simpo", "orpo")
    assert num_targets(SEQUENCES).tolist() == COUNTS
    loss = PreferenceLoss(options, num_targets(SEQUENCES), REFS if needs_reference else None, 0.25)
    torch.manual_seed(0)
    logprobs = (-torch.rand(sum(COUNTS), dtype=torch.float64) - 0.2).requires_grad_()

    def total(splits: list[list[int]]) -> torch.Tensor:
        results = [loss(tokens_of(logprobs, which)) for which in splits] + [loss(dummy(logprobs))]
        assert sum(float(r.sums["weight"]) for r in results) == pytest.approx(1.0)
        assert sum(float(r.token_sums["entropy"]) for r in results) == 2.0 * sum(COUNTS)
        assert all(not value.requires_grad for r in results for value in r.sums.values())
        assert sum(float(r.sums["loss"]) for r in results) == pytest.approx(
            sum(r.loss.item() for r in results)
        )
        return torch.stack([result.loss for result in results]).sum()

    whole, split, turned = total([[0, 1, 2, 3]]), total([[0, 1], [2, 3]]), total([[2, 3, 0, 1]])
    sums = torch.stack([part.sum() for part in logprobs.split(COUNTS)])
    kl, counts = 0.25, torch.tensor(COUNTS, dtype=torch.float64)
    sides = [
        Responses(sums[side::2], counts[side::2], REFS[side::2] if needs_reference else None)
        for side in (0, 1)
    ]
    nll = -sums[0::2].sum() / (COUNTS[0] + COUNTS[2])
    expected = pair_values(options, *sides, kl).loss.mean() + sft_coef * nll
    [reference] = torch.autograd.grad(expected, logprobs, retain_graph=True)
    for found in (whole, split, turned):
        assert float(found) == pytest.approx(float(expected), rel=1e-13)
        [gradient] = torch.autograd.grad(found, logprobs, retain_graph=True)
        assert torch.allclose(gradient, reference, rtol=1e-12, atol=0)

    def through_the_batch(values: torch.Tensor) -> torch.Tensor:
        return loss(tokens_of(values, [0, 1, 2, 3])).loss

    assert torch.autograd.gradcheck(through_the_batch, (logprobs.detach().clone().requires_grad_(),))


def test_what_is_logged() -> None:
    options = PreferenceOptions("dpo", 0.5, sft_coef=0.1)
    logprobs = -torch.ones(sum(COUNTS))
    result = PreferenceLoss(options, num_targets(SEQUENCES), REFS)(tokens_of(logprobs, [0, 1, 2, 3]))
    # rho: 0 and 0.5, then 2 and -0.5
    expected = {
        "reward_chosen": 0.5,
        "reward_rejected": 0.0,
        "reward_margin": 0.5,
        "reward_accuracy": 0.5,
        "logps_chosen": -3.5,
        "logps_rejected": -1.5,
        "sft_loss": 1.0,
        "weight": 1.0,
        "loss": -(log_sigma(-0.25) + log_sigma(1.25)) / 2 + 0.1,
    }
    assert {name: float(value) for name, value in result.sums.items()} == pytest.approx(expected)


def test_sums_of_slots_leave_out_nothing_and_repeat_bit_for_bit() -> None:
    torch.manual_seed(1)
    logprobs = -torch.rand(sum(COUNTS)) * 1e3
    tokens = tokens_of(logprobs, [2, 3, 0, 1])
    sums = tokens.sequence_sums(tokens.logprobs)
    parts = logprobs.double().split(COUNTS)
    assert sums.tolist() == pytest.approx([float(parts[i].sum()) for i in (2, 3, 0, 1)], rel=1e-15)
    assert torch.equal(sums, tokens.sequence_sums(tokens.logprobs))


def test_half_a_pair_is_a_programming_error() -> None:
    loss = PreferenceLoss(PreferenceOptions(), num_targets(SEQUENCES), REFS)
    with pytest.raises(AssertionError, match="whole pairs"):
        loss(tokens_of(-torch.ones(sum(COUNTS)), [0, 2]))
