"""The policy loss against TRL's own code: GRPOTrainer._compute_loss on the same logprobs, float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.losses.base import LossTokens, token_weights
from megarl.losses.policy import PolicyLoss, options_of

pytest.importorskip("trl")
# Importing its trainer takes half a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LENGTHS = [5, 9, 1, 12, 7, 3]
WIDTH = max(LENGTHS)
MASK = torch.tensor([[1] * n + [0] * (WIDTH - n) for n in LENGTHS])


def batch() -> dict[str, torch.Tensor]:
    """[S, T] each: ratios on both sides of every clip, sequences that drift up and down."""
    generator = torch.Generator().manual_seed(4)

    def noise(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.randn(*(shape or MASK.shape), generator=generator, dtype=torch.float64)

    cur = -noise(1.0).abs() - 0.2
    old = cur + noise(0.35) + noise(0.1, len(LENGTHS), 1)
    return {
        "cur": cur,
        "old": old,
        "ref": cur + noise(0.5),
        "rollout": old + noise(0.2) + noise(0.1, len(LENGTHS), 1),
        "advantages": noise(1.0, len(LENGTHS)),
    }


def of_trl(fields: dict[str, torch.Tensor], weights: torch.Tensor | None, **settings: Any) -> Any:
    """Loss and its gradient by the logprobs [S, T]; ``weights`` are the importance sampling ratios."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    cur = fields["cur"].clone().requires_grad_()
    defaults = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "max_completion_length": WIDTH,
    }
    arguments = {
        "use_bias_correction_kl": True,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    chosen = {name: value for name, value in settings.items() if name in arguments}
    own = {name: value for name, value in settings.items() if name not in arguments}
    keeps: dict[str, list[Any]] = {}
    stub = SimpleNamespace(
        **(defaults | own),
        args=SimpleNamespace(**(arguments | chosen)),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": _Lists(keeps)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction="sum": x),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (cur, torch.zeros_like(cur), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(MASK),
        "completion_mask": MASK,
        "advantages": fields["advantages"],
        "old_per_token_logps": fields["old"],
        "ref_per_token_logps": fields["ref"],
        "importance_sampling_ratio": weights,
        "num_items_in_batch": MASK.sum(),
    }
    loss = GRPOTrainer._compute_loss(stub, stub.model, inputs)
    loss.backward()
    return loss.detach(), cur.grad


class _Lists(dict):  # type: ignore[type-arg]
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


def of_megarl(fields: dict[str, torch.Tensor], **algorithm: Any) -> Any:
    """The same of PolicyLoss, on the tokens end to end."""
    config = GrpoAlgorithmConfig(**algorithm)
    at = MASK.bool()
    lengths = torch.tensor(LENGTHS)
    slots = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    weights = token_weights(lengths.numpy(), config.loss_aggregation, config.loss_length)
    cur = fields["cur"].clone().requires_grad_()
    tokens = LossTokens(
        logprobs=cur[at],
        entropy=torch.zeros(int(lengths.sum()), dtype=torch.float64),
        weights=torch.from_numpy(weights)[slots],
        labels=torch.zeros_like(slots),
        sequence_ids=slots,
        advantages=fields["advantages"][slots],
        old_logprobs=fields["old"][at],
        ref_logprobs=fields["ref"][at],
        rollout_logprobs=fields["rollout"][at],
        slots=slots,
        num_slots=len(LENGTHS),
    )
    loss = PolicyLoss(options_of(config))(tokens).loss
    loss.backward()
    return loss.detach(), cur.grad


def sampling_weights(fields: dict[str, torch.Tensor], mode: str, low: float | None, high: float) -> Any:
    """vllm_importance_sampling_mode, as TRL's documentation defines it."""
    difference = (fields["old"] - fields["rollout"]) * MASK
    ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio >= (low or 0.0)) & (ratio <= high), ratio, 0.0)


def same(fields: dict[str, torch.Tensor], theirs: Any, algorithm: dict[str, Any]) -> None:
    ours = of_megarl(fields, **algorithm)
    assert abs(float(theirs[0])) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


SEQUENCE = {"loss_aggregation": "sequence", "clip_high": 0.28}
MODES = {
    "token_truncate": {"off_policy_correction": "tis"},
    "token_mask": {"off_policy_correction": "icepop"},
    "sequence_truncate": {"off_policy_correction": "sequence_tis", "off_policy_sequence_weight": "product"},
    "sequence_mask": {"off_policy_correction": "sequence_icepop", "off_policy_sequence_weight": "product"},
}


@pytest.mark.parametrize(("low", "high"), [(None, 1.1), (0.8, 1.1)])
@pytest.mark.parametrize("mode", MODES)
def test_importance_sampling_modes(mode: str, low: float | None, high: float) -> None:
    fields = batch()
    weights = sampling_weights(fields, mode, low, high)
    plain = sampling_weights(fields, mode, 0.0, 1e9)
    assert (weights != plain).any(), "the bounds are reached"
    least = 0.0 if low is None and mode.endswith("mask") else low
    bounds = {"off_policy_low": least, "off_policy_high": high}
    same(fields, of_trl(fields, weights), SEQUENCE | MODES[mode] | bounds)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_kl(bias_correction: bool) -> None:
    fields = batch()
    theirs = of_trl(fields, None, beta=0.3, use_bias_correction_kl=bias_correction)
    gradient = "unbiased_old" if bias_correction else "plain"
    same(fields, theirs, SEQUENCE | {"kl_coef": 0.3, "kl_gradient": gradient})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo(level: str) -> None:
    fields = batch()
    exact = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.5}  # in TRL they are float32
    theirs = of_trl(fields, None, loss_type="sapo", importance_sampling_level=level, **exact)
    algorithm = {"objective": "sapo", "ratio_level": level, "loss_aggregation": "sequence"} | exact
    same(fields, theirs, algorithm)


def test_vespo() -> None:
    fields = batch()
    same(fields, of_trl(fields, None, loss_type="vespo"), {"objective": "vespo"})


def test_luspo_is_gspo_with_a_length_of_one() -> None:
    fields = batch()
    theirs = of_trl(fields, None, loss_type="luspo", importance_sampling_level="sequence")
    aggregation = {"loss_aggregation": "fixed_length", "loss_length": 1}
    same(fields, theirs, {"ratio_level": "sequence", "clip_high": 0.28} | aggregation)
