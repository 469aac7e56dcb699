"""Token-level advantages against sums written out from the definitions, in float64."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarl.advantages.token_level import TokenAdvantages, turn_rewards
from megarl.advantages.token_level import token_advantages as of_arrays
from megarl.records import Sample, Turn
from tests.oracles.samples import response_mask

GAMMA, LAMBDA, KL = 0.97, 0.9, 0.3


def token_advantages(
    rewards: list[list[tuple[int, float]]],
    values: list[np.ndarray],
    masks: list[list[int]],
    kls: list[np.ndarray] | None = None,
    **options: Any,
) -> Any:
    """Arguments per sequence: (position in the sequence, reward), values and masks."""
    offsets = np.cumsum([0, *map(len, masks)])
    found: TokenAdvantages = of_arrays(
        np.array([offsets[s] + place for s, own in enumerate(rewards) for place, _ in own]),
        np.array([reward for own in rewards for _, reward in own]),
        np.concatenate(values),
        np.concatenate([[0, *mask[1:]] for mask in masks]).astype(bool),
        offsets,
        kl=None if kls is None else np.concatenate(kls),
        **options,
    )
    return SimpleNamespace(
        advantages=np.split(found.advantages, offsets[1:-1]),
        returns=np.split(found.returns, offsets[1:-1]),
        explained_variance=found.explained_variance,
    )


def token_rewards(sample: Sample, start: int = 0) -> list[tuple[int, float]]:
    places, rewards = turn_rewards([sample], np.array([start, start + sample.num_tokens]))
    return list(zip(places.tolist(), rewards.tolist(), strict=True))


def make(
    seed: int, count: int = 5
) -> tuple[list[float], list[np.ndarray], list[list[int]], list[np.ndarray]]:
    draw = random.Random(seed)
    rewards, values, masks, kls = [], [], [], []
    for _ in range(count):
        n = draw.randint(3, 12)
        mask = [0, 0] + [int(draw.random() < 0.7) for _ in range(n - 2)]
        mask[0] = 1  # ignored: nothing predicts the first token
        masks.append(mask)
        live = np.array([0, *mask[1:]])
        values.append(live * np.array([draw.gauss(0, 1) for _ in range(n)]))
        kls.append(live * np.array([draw.gauss(0, 1) for _ in range(n)]))
        rewards.append(draw.gauss(0, 1))
    return rewards, values, masks, kls


def at_the_end(rewards: list[float], masks: list[list[int]]) -> list[list[tuple[int, float]]]:
    return [[(len(mask) - 1, reward)] for reward, mask in zip(rewards, masks, strict=True)]


def by_definition(reward: float, values: np.ndarray, targets: list[int], kl: np.ndarray) -> np.ndarray:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, summed term by term."""
    r = [-KL * kl[t] for t in targets]
    r[-1] += reward
    v = [values[t] for t in targets] + [0.0]
    out = []
    for i in range(len(targets)):
        terms = [
            (GAMMA * LAMBDA) ** (j - i) * (r[j] + GAMMA * v[j + 1] - v[j]) for j in range(i, len(targets))
        ]
        out.append(sum(terms))
    return np.array(out)


def test_against_the_definition() -> None:
    rewards, values, masks, kls = make(1)
    found = token_advantages(
        at_the_end(rewards, masks),
        values,
        masks,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        normalize=False,
        kls=kls,
        kl_coef=KL,
    )
    residuals, returns = [], []
    for s, mask in enumerate(masks):
        targets = [i for i, m in enumerate(mask) if m and i]
        expected = by_definition(rewards[s], values[s], targets, kls[s])
        assert found.advantages[s][targets] == pytest.approx(expected, abs=1e-12)
        assert found.returns[s][targets] == pytest.approx(expected + values[s][targets], abs=1e-12)
        others = [i for i in range(len(mask)) if i not in targets]
        assert not found.advantages[s][others].any() and not found.returns[s][others].any()
        residuals += expected.tolist()
        returns += (expected + values[s][targets]).tolist()
    assert found.explained_variance == pytest.approx(1 - np.var(residuals) / np.var(returns), abs=1e-12)


def test_normalisation_is_over_all_targets_and_leaves_returns() -> None:
    rewards, values, masks, _ = make(2)
    rewards, alone = at_the_end(rewards, masks), rewards
    plain = token_advantages(rewards, values, masks, gamma=1.0, gae_lambda=1.0, normalize=False)
    found = token_advantages(rewards, values, masks, gamma=1.0, gae_lambda=1.0, normalize=True)
    chosen = [np.array([0, *mask[1:]], dtype=bool) for mask in masks]
    own = np.concatenate([a[c] for a, c in zip(plain.advantages, chosen, strict=True)])
    normal = np.concatenate([a[c] for a, c in zip(found.advantages, chosen, strict=True)])
    assert normal == pytest.approx((own - own.mean()) / (own.std() + 1e-8), abs=1e-12)
    assert all((a == b).all() for a, b in zip(plain.returns, found.returns, strict=True))
    # With gamma = lambda = 1 and no KL every return is the episode's reward.
    for reward, got, mask in zip(alone, plain.returns, chosen, strict=True):
        assert got[mask] == pytest.approx(np.full(mask.sum(), reward), abs=1e-12)


def test_equal_advantages_are_zero_and_variance_is_left_out() -> None:
    found = token_advantages(
        [[(2, 1.0)], [(3, 1.0)]],
        [np.zeros(3), np.zeros(4)],
        [[0, 1, 1], [0, 1, 1, 1]],
        gamma=1.0,
        gae_lambda=1.0,
        normalize=True,
    )
    assert not any(a.any() for a in found.advantages)
    assert found.explained_variance is None


def test_a_turns_reward_comes_with_its_last_token() -> None:
    """Prompt of 2; turns of 3 + 2 observed, 2 + 1 observed, and 2: a token's return sums later rewards."""
    turns = [Turn(3, 2, 0.5), Turn(2, 1, -0.25), Turn(2, 0, 1.0)]
    sample = Sample(0, [7, 8], list(range(10)), [0.0] * 10, 0, "stop", reward=1.25, turns=turns)
    assert token_rewards(sample) == [(4, 0.5), (8, -0.25), (11, 1.0)]
    assert token_rewards(sample, 100) == [(104, 0.5), (108, -0.25), (111, 1.0)], "behind other samples"
    mask = [0, 0, *response_mask(sample)]
    found = token_advantages(
        [token_rewards(sample)], [np.zeros(12)], [mask], gamma=1.0, gae_lambda=1.0, normalize=False
    )
    expected = [0, 0, 1.25, 1.25, 1.25, 0, 0, 0.75, 0.75, 0, 1.0, 1.0]
    assert found.returns[0].tolist() == expected
    sample.turns = []
    assert token_rewards(sample) == [(11, 1.25)]


def test_no_reward_is_lost_where_its_place_is_no_target() -> None:
    rewards = [[(0, 1.0), (3, 2.0), (5, 4.0)]]
    found = token_advantages(
        rewards, [np.zeros(6)], [[0, 0, 1, 0, 1, 0]], gamma=1.0, gae_lambda=1.0, normalize=False
    )
    assert found.returns[0].tolist() == [0, 0, 7.0, 0, 4.0, 0]


def test_rewards_of_a_sequence_without_targets_go_nowhere() -> None:
    """They are not credited to a neighbour either: the first, an inner or the last sequence lacks targets."""
    masks = [[0, 0, 0], [0, 1, 1], [0, 0], [0, 1], [0, 0, 0]]
    rewards = [[(1, 9.0)], [(0, 1.0), (2, 2.0)], [(1, 5.0)], [(1, 3.0)], [(0, 7.0), (2, 8.0)]]
    values = [np.zeros(len(mask)) for mask in masks]
    found = token_advantages(rewards, values, masks, gamma=1.0, gae_lambda=1.0, normalize=False)
    assert [own.tolist() for own in found.returns] == [[0] * 3, [0, 3.0, 2.0], [0] * 2, [0, 3.0], [0] * 3]
