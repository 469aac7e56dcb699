"""A user's policy term against the built-in one, which computes the same with its own kernels."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarl.advantages.custom import custom_advantages, load_advantage
from megarl.config.grpo import GrpoAlgorithmConfig, GrpoConfig
from megarl.config.load import load_config
from megarl.errors import UserError
from megarl.losses.base import LossResult, LossTokens
from megarl.losses.custom import configured_loss
from megarl.records import Group, Prompt, Sample, token_ids
from tests.losses.test_policy import COUNT, SLOTS, noisy_tokens

ROOT = Path(__file__).parents[2]
TERMS = {"kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1, "positive_nll_coef": 0.2}


def loss_of(path: str, tokens: LossTokens, **algorithm: Any) -> LossResult:
    own = {"loss": f"tests.losses.own:{path}"} if path else {}
    return configured_loss(GrpoAlgorithmConfig(**own, **algorithm), check_numerics=False)(tokens)


def gradients(result: LossResult, tokens: LossTokens) -> list[torch.Tensor]:
    found = torch.autograd.grad(result.loss, [tokens.logprobs, tokens.entropy], allow_unused=True)
    return [torch.zeros(COUNT) if each is None else each for each in found]


def with_likelihood(tokens: LossTokens) -> LossTokens:
    torch.manual_seed(4)
    return replace(tokens, nll_weights=torch.rand(COUNT, dtype=tokens.logprobs.dtype) / COUNT)


@pytest.mark.parametrize("terms", [{}, TERMS], ids=["alone", "with KL, entropy and likelihood"])
def test_the_clipped_ratio_by_hand_is_the_built_in_objective(terms: dict[str, Any]) -> None:
    tokens = with_likelihood(noisy_tokens(torch.float64))
    own, built_in = loss_of("clipped", tokens, **terms), loss_of("", tokens, **terms)
    assert float(own.loss.detach()) == pytest.approx(float(built_in.loss.detach()), rel=1e-12)
    for mine, theirs in zip(gradients(own, tokens), gradients(built_in, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-15)
    assert own.sums.keys() == built_in.sums.keys()
    for name, value in built_in.sums.items():
        assert float(own.sums[name]) == pytest.approx(float(value), rel=1e-11), name
    assert own.token_sums.keys() == built_in.token_sums.keys() - {"clip_fraction"}
    for name, value in own.token_sums.items():
        assert float(value) == pytest.approx(float(built_in.token_sums[name]), rel=1e-11), name
    assert float(own.maxima["ratio_max"]) == pytest.approx(float(built_in.maxima["ratio_max"]), rel=1e-12)


def test_sequence_means_give_the_gradient_of_gspo() -> None:
    """The built-in one takes it where weights and advantages are those of a sequence, as here."""
    noisy = noisy_tokens(torch.float64)
    slots = torch.tensor(SLOTS)
    counts = torch.bincount(slots)[slots].double()
    advantages = torch.tensor([1.3, -0.7, 0.4, -2.0], dtype=torch.float64)[slots]
    tokens = replace(noisy, advantages=advantages, weights=1 / (4 * counts))
    own = loss_of("sequence_clipped", tokens)
    built_in = loss_of("", tokens, ratio_level="sequence", num_optimizer_steps_per_batch=2)
    assert float(own.loss.detach()) == pytest.approx(float(built_in.loss.detach()), rel=1e-12)
    for mine, theirs in zip(gradients(own, tokens), gradients(built_in, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-15)
    assert float(own.sums["gspo_clipped"]) == pytest.approx(0.5, rel=1e-6)  # two sequences of four
    assert float(built_in.token_sums["clip_fraction"]) == SLOTS.count(0) + SLOTS.count(1)


def test_tokens_of_weight_0_are_not_looked_at() -> None:
    tokens = noisy_tokens(torch.float64)
    weights = tokens.weights.clone()
    weights[40:70] = 0  # a sequence that was taken out of the loss, in part of two
    spoilt = tokens.old_logprobs.clone() if tokens.old_logprobs is not None else None
    assert spoilt is not None
    spoilt[40:70] = math.nan
    for path in ("clipped", "sequence_clipped"):
        clean = replace(tokens, weights=weights)
        dirty = replace(clean, old_logprobs=spoilt)
        assert float(loss_of(path, dirty).loss.detach()) == float(loss_of(path, clean).loss.detach())
        assert torch.equal(
            gradients(loss_of(path, dirty), dirty)[0], gradients(loss_of(path, clean), clean)[0]
        )


def test_without_old_logprobs_the_ratio_is_1_and_has_a_gradient() -> None:
    tokens = replace(noisy_tokens(torch.float64), old_logprobs=None)
    own, built_in = loss_of("clipped", tokens), loss_of("", tokens)
    torch.testing.assert_close(gradients(own, tokens)[0], gradients(built_in, tokens)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "mean_loss",
            r"algorithm.loss: tests.losses.own:mean_loss must return .*\[120\]; its loss has",
        ),
        (
            "unlogged",
            r"algorithm.loss: tests.losses.own:unlogged must return .*\[120\]; best has",
        ),
        ("nothing", r"algorithm.loss: tests.losses.own has no nothing"),
        ("not_a_function", r"algorithm.loss: tests.losses.own:not_a_function is a int, not a function"),
    ],
)
def test_mistakes_are_told_in_a_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loss_of(path, noisy_tokens(torch.float64))


def test_a_module_that_cannot_be_imported_is_told_with_its_field() -> None:
    algorithm = GrpoAlgorithmConfig(loss="no.such.module:loss")
    with pytest.raises(UserError, match="algorithm.loss: cannot import no.such.module: ModuleNotFoundError"):
        configured_loss(algorithm, check_numerics=False)


def test_the_loss_of_the_guide_begins_with_the_gradient_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 1 SAPO's gate has slope 1: its gradient is -A times the token's weight, as with a clip."""
    page = (ROOT / "docs" / "guides" / "custom-losses.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_rl.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(GrpoConfig, ROOT / "configs" / "grpo_custom_loss.yaml", check_files=False)
    tokens = replace(noisy_tokens(torch.float64), old_logprobs=None)
    loss = configured_loss(config.algorithm, check_numerics=False)
    assert tokens.advantages is not None
    expected = -tokens.advantages * tokens.weights
    torch.testing.assert_close(gradients(loss(tokens), tokens)[0], expected, rtol=1e-12, atol=0)
    weights = tokens.weights.double()
    gate = torch.where(tokens.advantages > 0, 2 / 1.0, 2 / 1.05)
    assert float(loss(tokens).sums["gate"]) == pytest.approx(float(weights @ gate.double()), rel=1e-6)

    advantage = load_advantage(config.algorithm.advantage)
    assert advantage is not None
    answers = [
        Sample(0, token_ids([1]), token_ids([2] * n), np.zeros(n, np.float32), 0, "stop") for n in (3, 1, 2)
    ]
    found = custom_advantages(
        advantage, "", [Group(Prompt(0, "", token_ids([1])), answers)], np.array([1.0, 0.0, 1.0])
    )
    assert found.tolist() == pytest.approx([1 / 3, -2 / 3, 2 / 3])
