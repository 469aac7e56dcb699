"""Against TRL's trainers on the same tokens, models and reference: loss, gradients and rewards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megarl.losses.preference import PreferenceOptions, Responses, pair_values
from megarl.records import TokenSequence, TrainBatch
from tests.dpo import ranks
from tests.models.tiny import make_model, save_model
from tests.trainer.world import world

pytest.importorskip("trl")
# Importing TRL takes half a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = "llama-biases"
PAIRS = ranks.make_pairs(3, count=8)
TOLERANCE = 1e-5

# Ours, and TRL's loss_type with its weights.
DPO_CASES: dict[str, tuple[PreferenceOptions, dict[str, Any]]] = {
    "dpo": (PreferenceOptions("dpo", 0.3), {"loss_type": ["sigmoid"]}),
    "dpo-normalized": (
        PreferenceOptions("dpo", 2.0, length_normalization=True),
        {"loss_type": ["sigmoid_norm"]},
    ),
    "dpo-sft": (
        PreferenceOptions("dpo", 0.1, sft_coef=0.7),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    "ipo": (PreferenceOptions("ipo", 0.4, length_normalization=True), {"loss_type": ["ipo"]}),
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("trl-model")
    save_model(MODEL, folder)
    return str(folder)


def tokenizer() -> Any:
    """A tokenizer that TRL accepts; the tests' tokens never pass through it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3, "[EOS]": 4}, unk_token="[PAD]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]")


def split(sequence: TokenSequence) -> tuple[list[int], list[int]]:
    start = int(sequence.loss_mask.argmax())
    return sequence.token_ids[:start].tolist(), sequence.token_ids[start:].tolist()


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


def ours(
    model_dir: str, options: PreferenceOptions, sequences: TrainBatch, refs: torch.Tensor, kl: float = 0.0
) -> tuple[float, dict[str, np.ndarray]]:
    [answer] = world(1).run(ranks.preference_gradients, model_dir, options, sequences, refs.tolist(), kl)
    loss, gradients = answer
    return loss, gradients


def hf_logps(model: Any, sequences: Iterable[TokenSequence]) -> torch.Tensor:
    from tests.models.tiny import hf_logprobs

    with torch.no_grad():
        return torch.stack(
            [
                hf_logprobs(model, s.token_ids.tolist())[int(s.loss_mask.argmax()) - 1 :].double().sum()
                for s in sequences
            ]
        )


def assert_same(loss: float, gradients: dict[str, np.ndarray], model: Any, expected: torch.Tensor) -> None:
    model.zero_grad()
    expected.backward()
    theirs = {name: param.grad.numpy() for name, param in model.named_parameters()}
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE)
    assert gradients.keys() == theirs.keys()
    assert max(np.abs(gradient).max() for gradient in theirs.values()) > 1e-3
    for name, gradient in theirs.items():
        assert np.abs(gradients[name] - gradient).max() < TOLERANCE, name


@pytest.mark.parametrize("name", DPO_CASES)
def test_dpo_trainer(tmp_path: Path, model_dir: str, name: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    options, their_options = DPO_CASES[name]
    reference = make_model(MODEL, seed=5)
    trainer = DPOTrainer(
        model=make_model(MODEL),
        ref_model=reference,
        args=DPOConfig(**settings(tmp_path), beta=options.beta, **their_options),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer(),
    )
    rows = []
    for chosen, rejected in zip(list(PAIRS)[0::2], list(PAIRS)[1::2], strict=True):
        prompt, response = split(chosen)
        rows.append({"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": split(rejected)[1]})
    trainer.model.train()  # these models have no dropout
    expected = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(rows))
    refs = hf_logps(make_model(MODEL, seed=5), PAIRS)
    loss, gradients = ours(model_dir, options, PAIRS, refs)
    assert_same(loss, gradients, trainer.model, expected)
    if name == "dpo":
        logged = {key: values[0] for key, values in trainer._metrics["train"].items()}
        logps = hf_logps(make_model(MODEL), PAIRS)
        sides = [Responses(logps[side::2], torch.ones(len(rows)), refs[side::2]) for side in (0, 1)]
        values = pair_values(options, *sides)
        margins = values.reward_chosen - values.reward_rejected
        found = {
            "rewards/chosen": values.reward_chosen.mean(),
            "rewards/rejected": values.reward_rejected.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).double().mean(),
            "logps/chosen": logps[0::2].mean(),
            "logps/rejected": logps[1::2].mean(),
        }
        for key, value in found.items():
            assert float(value) == pytest.approx(logged[key], abs=1e-4), key


def test_kto_trainer(tmp_path: Path, model_dir: str) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    options = PreferenceOptions("kto", 0.2, desirable_weight=1.3, undesirable_weight=0.8)
    texts = [{"prompt": p, "completion": "b", "label": p == "a"} for p in ("a", "c")]
    trainer = KTOTrainer(
        model=make_model(MODEL),
        ref_model=make_model(MODEL, seed=5),
        args=KTOConfig(
            **settings(tmp_path),
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list(texts * 4),
        processing_class=tokenizer(),
    )
    rows, mismatched = [], []
    for number, sequence in enumerate(PAIRS):
        prompt, response = split(sequence)
        other = split(PAIRS[(number + 2) % len(PAIRS)])[1]
        label = number % 2 == 0
        rows.append(
            {"prompt_ids": prompt, "completion_ids": response, "KL_completion_ids": other, "label": label}
        )
        mismatched.append(TokenSequence(prompt + other, [0] * len(prompt) + [1] * len(other)))
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(rows)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    policy, reference = make_model(MODEL), make_model(MODEL, seed=5)
    kl = max(0.0, float((hf_logps(policy, mismatched) - hf_logps(reference, mismatched)).mean()))
    assert kl > 0.01, "the case must have a KL"
    assert kl == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-4)
    loss, gradients = ours(model_dir, options, PAIRS, hf_logps(reference, PAIRS), kl)
    assert_same(loss, gradients, trainer.model, expected)


def scores(seed: int, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand(2, 64, generator=generator, dtype=torch.float64) * (high - low) + low
    return pair[0], pair[1]


@pytest.mark.parametrize(("loss", "smoothing"), [("simpo", 0.0), ("simpo", 0.2), ("dpo", 0.0), ("dpo", 0.1)])
def test_cpo_formulas(loss: str, smoothing: float) -> None:
    """CPO's trainer has SimPO, and conservative label smoothing of the logistic loss."""
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = scores(1, -8.0, -0.1)
    stub = SimpleNamespace(
        alpha=0.0,
        beta=1.7,
        simpo_gamma=0.6,
        label_smoothing=smoothing,
        loss_type={"simpo": "simpo", "dpo": "sigmoid"}[loss],
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected = CPOTrainer.cpo_loss(stub, chosen, rejected)
    options = PreferenceOptions(loss, 1.7, label_smoothing=smoothing, simpo_gamma=0.6)  # type: ignore[arg-type]
    counts = torch.arange(1, 65, dtype=torch.float64)
    scale = counts if loss == "simpo" else torch.ones(())
    found = pair_values(
        options, Responses(chosen * scale, counts, None), Responses(rejected * scale, counts, None)
    )
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


def test_orpo_formula() -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = scores(2, -8.0, -0.05)
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, reward_chosen, reward_rejected, *_ = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
    ones = torch.ones(64, dtype=torch.float64)
    found = pair_values(
        PreferenceOptions("orpo", 0.3), Responses(chosen, ones, None), Responses(rejected, ones, None)
    )
    # Theirs is in float32.
    for one, two in zip(found, (-losses, reward_chosen, reward_rejected), strict=True):
        assert torch.allclose(one, two.double(), rtol=1e-5, atol=1e-6)
