"""Two ranks in every layout against one rank: loss, gradient norm, metrics, reference logprobs, weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl.losses.preference import PreferenceOptions
from tests.dpo import ranks
from tests.models.tiny import hf_logprobs, make_model, save_model
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
OPTIONS = {
    "dpo": PreferenceOptions("dpo", 0.3, label_smoothing=0.1, sft_coef=0.2),
    "ipo": PreferenceOptions("ipo", 0.5, length_normalization=True),
    "kto": PreferenceOptions("kto", 0.2, desirable_weight=1.2, undesirable_weight=0.9),
    "simpo": PreferenceOptions("simpo", 2.0, simpo_gamma=0.5),
    "orpo": PreferenceOptions("orpo", 0.3, sft_coef=1.0),
}
STEPS = 3
CASES = [("dpo", layout) for layout in LAYOUTS] + [
    *(("kto", layout) for layout in ("cp2", "cp2-whole", "pp2")),
    *(("ipo", layout) for layout in ("cp2", "dp2")),
    ("simpo", "cp2"),
    ("orpo", "cp2"),
    ("orpo", "dp2"),
]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("dpo-models")
    save_model("qwen3-tied", folder / "first")
    save_model("qwen3-tied", folder / "second", seed=5)
    return {"first": str(folder / "first"), "second": str(folder / "second")}


@functools.cache
def one_rank(model_dir: str, reference_dir: str, name: str) -> dict[str, Any]:
    [result] = world(1).run(ranks.preference_steps, model_dir, reference_dir, OPTIONS[name], STEPS)
    norms = [step["grad_norm"] for step in result["log"]]
    assert len(norms) == STEPS and min(norms) > 0.01
    assert result["microbatches"] > 1
    return dict(result)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout_equals_one_rank(models: dict[str, str], name: str, layout: str) -> None:
    expected = one_rank(models["first"], models["second"], name)
    arguments = (models["first"], models["second"], OPTIONS[name], STEPS)
    results = world(2).run(ranks.preference_steps, *arguments, parallel=LAYOUTS[layout])
    for result in results:
        assert result["log"] == results[0]["log"], "every rank reports the same"
        assert result["refs"] == results[0]["refs"], "and has the same reference logprobs"
        assert result["held_out"] == results[0]["held_out"]
    found = results[0]
    for ours, theirs in zip(found["refs"], expected["refs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    placed = [take_split_counts(values) for values in found["log"]]
    mixed = [sum(counts) == 10 and min(counts) > 0 for counts in placed if counts]
    assert bool(mixed) == layout.endswith("whole") and all(mixed)
    lines = [*zip(expected["log"], found["log"], strict=True), (expected["held_out"], found["held_out"])]
    for one, two in lines:
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for key, value in expected["weights"].items():
        assert np.abs(found["weights"][key] - value).max() < 1e-5, key


def test_summed_logprobs_are_those_of_transformers(models: dict[str, str]) -> None:
    """With the policy's weights and, for a while, with another directory's; more ranks than sequences too."""
    sequences = ranks.make_pairs(7)
    [found] = world(1).run(ranks.logps, models["first"], sequences, models["second"])
    for key, seed in (("before", 0), ("other", 5), ("after", 0)):
        model = make_model("qwen3-tied", seed=seed)
        expected = [
            float(hf_logprobs(model, s.token_ids.tolist())[prompt - 1 :].detach().double().sum())
            for s in sequences
            for prompt in [int(s.loss_mask.argmax())]
        ]
        assert found[key] == pytest.approx(expected, abs=1e-4)
    results = world(2).run(ranks.logps, models["first"], sequences.select([0]), models["second"])
    for result in results:
        assert result["before"] == pytest.approx(found["before"][:1], abs=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_the_reference_is_the_model_at_its_path(tmp_path: Path, own: bool) -> None:
    """reference.path, else model.path; by transformers in float64, one response at a time."""
    for name, seed in (("policy", 1), ("other", 9)):
        save_model("qwen3-tied", tmp_path / name, seed=seed)
    model_dir, other = str(tmp_path / "policy"), str(tmp_path / "other")
    path = None if own else other
    pairs = ranks.make_pairs(1, count=3)
    [found] = world(1).run(ranks.reference_of, model_dir, path, str(tmp_path / "run"), pairs)
    model = make_model("qwen3-tied", seed=1 if own else 9).double()
    for sequence, value in zip(pairs, found, strict=True):
        logps = hf_logprobs(model, sequence.token_ids)
        expected = logps[np.array(sequence.loss_mask[1:], bool)].sum()
        assert value == pytest.approx(float(expected.detach()), abs=1e-3)
