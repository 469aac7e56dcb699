"""Reward models: transformers' sequence classification on the same pairs, layouts, checkpoints, export."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megarl.errors import UserError
from megarl.models.score import initial_score, score_architecture, score_config
from tests.dpo.ranks import make_pairs
from tests.models.tiny import save_model
from tests.reward import ranks
from tests.trainer.ranks import take_split_counts
from tests.trainer.world import world

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "cp2-whole": {"context_parallel_size": 2, "context_split_from": 24},
}
CENTER = 0.05
STEPS = 3


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied language model, and a sequence classification model with its own head."""
    folder: Path = tmp_path_factory.mktemp("reward-models")
    base = save_model("qwen3-tied", folder / "language")
    torch.manual_seed(3)
    config = transformers.Qwen3Config.from_pretrained(folder / "language", num_labels=1)
    scored = transformers.Qwen3ForSequenceClassification(config)
    scored.model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        scored.score.weight.normal_(0, 0.3)
    scored.save_pretrained(folder / "scored")
    return {"language": str(folder / "language"), "scored": str(folder / "scored")}


def hf_scores(model_dir: str, token_ids: list[list[int]], dtype: torch.dtype = torch.float32) -> Any:
    """The model and its scores, one sequence at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=dtype).eval()
    return model, torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in token_ids])


def test_loss_and_gradients_equal_sequence_classification(models: dict[str, str]) -> None:
    """The Bradley-Terry loss of transformers' scores, differentiated by torch, against a packed step."""
    pairs = make_pairs(3, count=8)
    [(loss, grads)] = world(1).run(ranks.reward_gradients, models["scored"], pairs, CENTER)
    model, scores = hf_scores(models["scored"], [s.token_ids for s in pairs])
    chosen, rejected = scores[0::2], scores[1::2]
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    expected = expected + CENTER * ((chosen + rejected) ** 2).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    compared = 0
    for name, param in model.named_parameters():
        assert np.abs(grads[name] - param.grad.numpy()).max() < 1e-5, name
        compared += 1
    assert compared == len(grads)


@functools.cache
def one_rank(model_dir: str) -> dict[str, Any]:
    [result] = world(1).run(ranks.reward_steps, model_dir, STEPS, CENTER)
    assert min(step["grad_norm"] for step in result["log"]) > 0.01
    assert result["microbatches"] > 1
    return dict(result)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["language", "scored"])
def test_layout_equals_one_rank(models: dict[str, str], model: str, layout: str) -> None:
    expected = one_rank(models[model])
    assert expected["new_head"] == (model == "language")
    results = world(2).run(ranks.reward_steps, models[model], STEPS, CENTER, parallel=LAYOUTS[layout])
    found = results[0]
    assert results[1]["log"] == found["log"] and results[1]["scores"] == found["scores"]
    placed = [take_split_counts(values) for values in found["log"]]
    mixed = [sum(counts) == 10 and min(counts) > 0 for counts in placed if counts]
    assert bool(mixed) == layout.endswith("whole") and all(mixed)
    lines = [*zip(expected["log"], found["log"], strict=True), (expected["held_out"], found["held_out"])]
    for one, two in lines:
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5, abs=1e-5)
    for key, value in expected["weights"].items():
        assert np.abs(found["weights"][key] - value).max() < 1e-5, key


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
def test_export_loads_in_transformers(models: dict[str, str], tmp_path: Path, layout: str) -> None:
    """The exported directory gives the scores the trainer had, from a language model with a new head."""
    directory = str(tmp_path / "hf")
    arguments = (models["language"], STEPS, CENTER, directory)
    result = world(2).run(ranks.reward_steps, *arguments, parallel=LAYOUTS[layout])[0]
    pairs = make_pairs(STEPS - 1)
    model, scores = hf_scores(directory, [s.token_ids for s in pairs])
    assert model.config.num_labels == 1
    assert scores.tolist() == pytest.approx(result["scores"], rel=1e-5, abs=1e-5)
    # And it is where the next run may begin, head included.
    again = world(1).run(ranks.reward_steps, directory, 1, CENTER)[0]
    assert again["new_head"] is False


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
def test_checkpoint_goes_on_as_if_uninterrupted(models: dict[str, str], tmp_path: Path, layout: str) -> None:
    directory = str(tmp_path / "checkpoint")
    for first, second in world(2).run(
        ranks.save_and_load, models["language"], directory, parallel=LAYOUTS[layout]
    ):
        assert first == second


def test_configuration_of_the_export() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": [2, 3],
        "pad_token_id": 3,
        "vocab_size": 9,
    }
    changed = score_config(config)
    assert changed["architectures"] == ["LlamaForSequenceClassification"]
    assert changed["pad_token_id"] is None, "transformers would score the token before the last"
    assert changed["vocab_size"] == 9 and json.dumps(changed)
    assert score_config(config | {"pad_token_id": 0})["pad_token_id"] == 0
    with pytest.raises(UserError, match="architectures"):
        score_config({"architectures": ["LlamaModel"]})


def test_new_head_follows_the_seed(models: dict[str, str]) -> None:
    from megarl.models import load_architecture

    architecture = score_architecture(load_architecture(models["language"]))
    one, two = (initial_score(architecture, seed)["score.weight"] for seed in (1, 2))
    assert torch.equal(one, initial_score(architecture, 1)["score.weight"])
    assert not torch.equal(one, two)
    assert float(one.std()) == pytest.approx(architecture.spec.init_std, rel=0.5)
    assert "lm_head.weight" not in architecture.hf_shapes()
