"""Low-rank adapters against PEFT on the Hugging Face model, and every layout against one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from megarl.records import TokenSequence
from tests.trainer import lora_ranks, ranks
from tests.trainer.world import world

ALL = {"rank": 4, "alpha": 6.0, "target_modules": ["all-linear"]}
SOME = {"rank": 3, "alpha": 8.0, "target_modules": ["v_proj", "q_proj", "up_proj"]}
ATTENTION = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = [("llama-biases", ALL), ("qwen3-tied", SOME), ("qwen3-moe", ATTENTION)]
IDS = [name for name, _ in MODELS]


def hf_model(model_dir: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def with_peft(model_dir: str, lora: dict[str, Any]) -> Any:
    """PEFT's model with adapters of its own making."""
    targets = LINEAR if lora["target_modules"] == ["all-linear"] else lora["target_modules"]
    config = peft.LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets)
    return peft.get_peft_model(hf_model(model_dir), config)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's A and B by the names they have in its files."""
    named = {name.replace(".default", ""): param for name, param in model.named_parameters()}
    return {name: param for name, param in named.items() if param.requires_grad}


def set_values(model: Any, values: lora_ranks.Tensors) -> None:
    for name, param in trained(model).items():
        param.data.copy_(torch.from_numpy(values[name]))


def random_values(model_dir: str, lora: dict[str, Any]) -> lora_ranks.Tensors:
    """An A and a B that are both far from 0 (as they are made, B is 0 and A has no gradient)."""
    generator = torch.Generator().manual_seed(3)
    params = trained(with_peft(model_dir, lora))
    return {key: (torch.randn(p.shape, generator=generator) * 0.1).numpy() for key, p in params.items()}


def hf_loss(model: Any, sequences: list[TokenSequence]) -> torch.Tensor:
    """Mean negative logprob of all targets, one sequence at a time."""
    total, count = torch.zeros(()), 0
    for s in sequences:
        ids, mask = torch.tensor(s.token_ids)[None], torch.tensor(s.loss_mask[1:])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total, count = total - (logprobs * mask).sum(), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize(("name", "lora"), MODELS, ids=IDS)
def test_gradients_are_those_of_peft(model_dirs: dict[str, str], name: str, lora: dict[str, Any]) -> None:
    values = random_values(model_dirs[name], lora)
    [found] = world(1).run(lora_ranks.gradients, model_dirs[name], lora, values, 5)
    model = with_peft(model_dirs[name], lora)
    set_values(model, values)
    hf_loss(model, ranks.make_sequences(5)).backward()
    expected = {key: param.grad.numpy() for key, param in trained(model).items() if param.grad is not None}
    assert found.keys() == expected.keys() == values.keys()
    for key, grad in expected.items():
        assert np.abs(grad).max() > 1e-4, key
        assert np.abs(found[key] - grad).max() < 1e-5 * max(np.abs(grad).max(), 1e-2), key


@pytest.mark.parametrize(("name", "lora"), MODELS[:2], ids=IDS[:2])
def test_steps_are_those_of_peft_and_torch(
    model_dirs: dict[str, str], name: str, lora: dict[str, Any]
) -> None:
    """From the trainer's own initialisation; AdamW and gradient clipping are torch's."""
    steps = list(range(4))
    [found] = world(1).run(lora_ranks.train, model_dirs[name], lora, steps)
    model = with_peft(model_dirs[name], lora)
    set_values(model, found["initial"])
    params, options = list(trained(model).values()), ranks.OPTIMIZER | lora_ranks.OPTIMIZER
    optimizer = torch.optim.AdamW(
        params,
        lr=options["lr"],
        betas=(0.9, 0.95),
        eps=options["adam_eps"],
        weight_decay=options["weight_decay"],
    )
    for number, (loss, norm, _) in zip(steps, found["log"], strict=True):
        optimizer.zero_grad()
        expected = hf_loss(model, ranks.make_sequences(number))
        expected.backward()
        assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(params, 1.0)), rel=1e-4)
        optimizer.step()
    for key, param in trained(model).items():
        moved = np.abs(found["adapters"][key] - found["initial"][key]).max()
        assert moved > 5e-3, key
        assert np.abs(found["adapters"][key] - param.detach().numpy()).max() < 1e-5, key
    merged = model.merge_and_unload().state_dict()
    for key, tensor in found["weights"].items():
        assert np.abs(tensor - merged[key].numpy()).max() < 2e-5, key


def test_adapters_are_made_as_peft_makes_them(model_dirs: dict[str, str]) -> None:
    """B is 0, A uniform within 1/sqrt(inputs), and no two alike: PEFT's distribution, another generator."""
    name = "llama-biases"
    [found] = world(1).run(lora_ranks.train, model_dirs[name], ALL, [])
    theirs = trained(with_peft(model_dirs[name], ALL))
    firsts = set()
    for key, value in found["initial"].items():
        if ".lora_B." in key:
            assert not value.any()
            assert not theirs[key].any()
            continue
        bound = value.shape[1] ** -0.5
        for a in (value, theirs[key].detach().numpy()):
            assert np.abs(a).max() <= bound
            assert np.abs(a).max() > 0.9 * bound
            assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        firsts.add(float(value[0, 0]))
    assert len(firsts) == len(found["initial"]) // 2


@pytest.mark.parametrize(("name", "lora"), MODELS, ids=IDS)
def test_exports_give_the_trainers_logits(
    model_dirs: dict[str, str], tmp_path: Path, name: str, lora: dict[str, Any]
) -> None:
    values = random_values(model_dirs[name], lora)
    ids = [[5, 17, 101, 3, 249, 8], [40, 2, 90], list(range(30, 60))]
    [logits] = world(1).run(lora_ranks.export_both, model_dirs[name], lora, values, str(tmp_path), ids)
    base = hf_model(model_dirs[name])
    models = {"base": base, "merged": hf_model(str(tmp_path / "hf"))}
    models["adapter"] = peft.PeftModel.from_pretrained(hf_model(model_dirs[name]), tmp_path / "adapter")
    with torch.no_grad():
        found = {
            kind: torch.cat([model(torch.tensor([s])).logits[0] for s in ids]).numpy()
            for kind, model in models.items()
        }
    assert np.abs(found["base"] - logits).max() > 0.01, "the adapters do something"
    for kind in ("merged", "adapter"):
        assert np.abs(found[kind] - logits).max() < 1e-5 * max(1.0, np.abs(logits).max()), kind
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model_dirs[name]
    # Without a base given PEFT finds it by that path.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        again = alone(torch.tensor([ids[0]])).logits[0].numpy()
    assert np.array_equal(again, found["adapter"][: len(ids[0])])


def test_the_reference_is_the_model_without_adapters(model_dirs: dict[str, str]) -> None:
    """To the bit, and without a copy of the weights."""
    name = "qwen3-tied"
    values = random_values(model_dirs[name], SOME)
    [facts] = world(1).run(lora_ranks.reference_facts, model_dirs[name], SOME, values)
    assert facts["copy"] is None
    assert all(map(np.array_equal, facts["reference"], facts["base"]))
    assert all(map(np.array_equal, facts["again"], facts["own"]))
    assert max(np.abs(a - b).max() for a, b in zip(facts["own"], facts["base"], strict=True)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_publishing_never_touches_the_frozen_weights(model_dirs: dict[str, str], dtype: str) -> None:
    [facts] = world(1).run(lora_ranks.publish_facts, model_dirs["qwen3-tied"], SOME, dtype)
    assert facts["untouched"]
    assert facts["stayed"]
    assert facts["offered_stayed"]
    assert facts["copied"] == [
        f"decoder.layers.{layer}.{kind}.weight"
        for layer in range(2)
        for kind in ("mlp.linear_fc1", "self_attention.linear_qkv")
    ]
    # One rounding: half a unit in the last place of bfloat16 is 2^-9.
    assert max(facts["worst"]) < (1e-6 if dtype == "float32" else 2**-8)
    assert max(facts["worst"]) > 0


def test_memory_is_that_of_the_adapters(model_dirs: dict[str, str]) -> None:
    """Gradients and Adam's two moments exist for A and B alone."""
    [full] = world(1).run(lora_ranks.memory, model_dirs["llama-deep-tied"], None)
    [found] = world(1).run(lora_ranks.memory, model_dirs["llama-deep-tied"], ATTENTION)
    num = 4 * 4 * ((64 + 64) + 2 * (32 + 64) + (64 + 64))  # layers, rank, q + k and v + o
    adapted = 4 * (64 * (64 + 2 * 32) + 64 * 64)  # the whole of q|k|v and o: what engines read is a copy
    assert found == {
        "gradients": num,
        "optimizer": 2 * num,
        "parameters": full["parameters"],
        "adapted": adapted,
    }
    assert full["adapted"] == 0
    assert full["gradients"] == full["parameters"]
    assert full["optimizer"] == 2 * full["parameters"]
