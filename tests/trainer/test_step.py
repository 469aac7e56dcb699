"""Gradients, optimizer steps and the reference of one rank, against Hugging Face and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence
from tests.models.tiny import hf_logprobs, make_model
from tests.trainer import ranks
from tests.trainer.world import world

NAMES = ("qwen3-tied", "llama-biases")


def hf_loss(
    model: transformers.PreTrainedModel,
    sequences: list[TokenSequence],
    aggregation: str,
    with_advantage: bool,
) -> torch.Tensor:
    """Mean over targets, or over sequences of the mean over targets; sequences run one by one, unpacked."""
    sums, counts = [], []
    for sequence in sequences:
        mask = torch.tensor(sequence.loss_mask[1:], dtype=torch.float32)
        scale = float(ranks.advantages_of([sequence])[0]) if with_advantage else 1.0
        sums.append(-scale * (mask * hf_logprobs(model, sequence.token_ids)).sum())
        counts.append(float(mask.sum()))
    if aggregation == "token":
        return torch.stack(sums).sum() / sum(counts)
    means = [s / c for s, c in zip(sums, counts, strict=True) if c]
    return torch.stack(means).mean()


def hf_gradients(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: param.grad.numpy() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "aggregation", "with_advantage"),
    [
        ("qwen3-tied", "token", False),
        ("llama-biases", "sequence", False),
        ("llama-biases", "token", True),
        ("qwen3-tied", "sequence", True),
        ("mistral", "token", False),
        ("smollm3", "token", False),
    ],
)
def test_packed_gradients_equal_hf_unpacked_for_any_split(
    model_dirs: dict[str, str], name: str, aggregation: str, with_advantage: bool
) -> None:
    sequences = ranks.make_sequences(11)
    count = len(sequences)
    splits = [
        None,
        [[i] for i in range(count)],
        [list(range(count))],
        [[8, 0, 3], [1], [], [2, 4, 5, 6, 7]],
    ]
    loss = ranks.advantage_loss if with_advantage else sft_loss
    [answers] = world(1).run(ranks.gradients, model_dirs[name], sequences, aggregation, loss, splits)

    model = make_model(name)
    expected = hf_loss(model, sequences, aggregation, with_advantage)
    expected.backward()
    # On policy the ratio is 1: the loss is minus the mean advantage, its gradient that of hf_loss.
    if with_advantage:
        counts = np.array([sum(s.loss_mask[1:].tolist()) for s in sequences])
        shares = counts * ranks.token_weights(counts, aggregation)  # type: ignore[arg-type]
        value = -float((shares * ranks.advantages_of(sequences)).sum())
    else:
        value = float(expected.detach())
    gradients = hf_gradients(model)
    assert max(np.abs(g).max() for g in gradients.values()) > 0.01
    for total, found in answers:
        assert total == pytest.approx(value, abs=1e-6)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert np.abs(found[key] - gradient).max() < 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_steps_equal_torch_adamw(model_dirs: dict[str, str], name: str) -> None:
    """Clipping, weight decay on matrices only, warm-up and cosine: the weights of HF trained by torch."""
    steps = [ranks.make_sequences(seed) for seed in range(20, 24)]
    bound = 0.5
    [(metrics, found)] = world(1).run(
        ranks.sft_steps, model_dirs[name], steps, {"max_grad_norm": bound, "weight_decay": 0.3}
    )
    model = make_model(name)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    settings = ranks.OPTIMIZER
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=settings["adam_eps"],
    )
    warmup, low, high = settings["lr_warmup_steps"], settings["min_lr"], settings["lr"]
    for number, (sequences, logged) in enumerate(zip(steps, metrics, strict=True)):
        if number < warmup:
            rate = high * number / warmup
        else:
            progress = (number - warmup) / (ranks.TOTAL_STEPS - warmup)
            rate = low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = hf_loss(model, sequences, "token", False)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        assert float(norm) > bound, "the case must clip"
        optimizer.step()
        assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12, abs=0)
    start = make_model(name)
    for key, param in model.named_parameters():
        moved = (param - start.get_parameter(key)).abs().max()
        assert moved > 1e-3, key
        assert np.abs(found[key] - param.detach().numpy()).max() < 2e-6, key


def test_first_policy_step_has_ratio_one(model_dirs: dict[str, str]) -> None:
    [metrics] = world(1).run(ranks.first_policy_step, model_dirs["qwen3-tied"])
    assert metrics["ratio_mean"] == 1.0
    assert metrics["ratio_max"] == 1.0
    assert metrics["kl_policy"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0.1


@pytest.mark.parametrize("distributed", [False, True])
def test_reference_is_an_exchange_of_pointers(model_dirs: dict[str, str], distributed: bool) -> None:
    [facts] = world(1).run(ranks.reference_exchange, model_dirs["qwen3-tied"], distributed)
    previous = facts["start"]
    for own, reference, again in zip(facts["own"], facts["reference"], facts["again"], strict=True):
        assert np.abs(own - previous).max() > 1e-3, "training changes the policy"
        assert np.array_equal(reference, facts["start"]), "and never the reference"
        assert np.array_equal(again, own), "which leaves no trace"
        previous = own
    assert facts["stayed"] == [True, True]
    assert facts["equal_metrics"]
    assert facts["restored_after_error"]


@pytest.mark.parametrize("distributed", [False, True])
def test_sleep_between_steps_frees_gradients_and_changes_nothing(
    model_dirs: dict[str, str], distributed: bool
) -> None:
    arguments = (model_dirs["qwen3-tied"], distributed)
    awake = world(1).run(ranks.train_with_naps, *arguments, [])[0]
    napping = world(1).run(ranks.train_with_naps, *arguments, ["gradients", "optimizer"])[0]
    assert all(size > 0 for size in awake["gradient_bytes"])
    assert all(size == 0 for size in napping["gradient_bytes"])
    for name, value in awake["weights"].items():
        assert np.array_equal(value, napping["weights"][name]), name


def test_moments_decay_as_their_settings_say(model_dirs: dict[str, str]) -> None:
    """Three steps with betas of their own: torch's AdamW with these ends elsewhere than with the defaults."""
    steps = [ranks.make_sequences(seed) for seed in range(20, 23)]
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.6, "lr_warmup_steps": 0, "lr_schedule": "constant"}
    [(_, found)] = world(1).run(
        ranks.sft_steps,
        model_dirs["qwen3-tied"],
        steps,
        settings | {"max_grad_norm": 0.0, "weight_decay": 0.0},
    )

    def trained(betas: tuple[float, float]) -> dict[str, torch.Tensor]:
        model = make_model("qwen3-tied")
        high, eps = ranks.OPTIMIZER["lr"], ranks.OPTIMIZER["adam_eps"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=high, betas=betas, eps=eps, weight_decay=0.0)
        for sequences in steps:
            optimizer.zero_grad()
            hf_loss(model, sequences, "token", False).backward()
            optimizer.step()
        return {name: param.detach() for name, param in model.named_parameters()}

    ours, defaults = trained((0.5, 0.6)), trained((0.9, 0.95))
    for key, param in ours.items():
        assert np.abs(found[key] - param.numpy()).max() < 5e-6, key
        assert (param - defaults[key]).abs().max() > 1e-4, key


def test_a_type_rounds_the_models_weights(model_dirs: dict[str, str]) -> None:
    for dtype in ("float32", "bfloat16"):
        [(types, found)] = world(1).run(ranks.types_and_weights, model_dirs["qwen3-tied"], dtype)
        assert types == {f"torch.{dtype}"}
        for name, param in make_model("qwen3-tied").named_parameters():
            expected = param.detach().to(getattr(torch, dtype)).float()
            assert np.array_equal(found[name], expected.numpy()), name
