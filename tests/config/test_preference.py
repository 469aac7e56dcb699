"""Rules of `megarl dpo`: the exact line when one is broken, silence just inside it, defaults of each loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.load import load_config
from megarl.config.preference import DpoConfig, PreferenceAlgorithmConfig
from megarl.errors import UserError
from megarl.losses.preference import PreferenceOptions, options_of

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 100}
DPO: dict[str, Any] = {
    "run": {"dir": "r"},
    "model": {"path": "m"},
    "optimizer": {"lr": 1e-3},
    "data": {"train": {**GYM, "seed": 0}, "held_out": {**GYM, "seed": 100}},
    "training": {"num_steps": 10, "batch_size": 8, "validation_size": 100},
}


def load(tmp_path: Path, overrides: list[str]) -> DpoConfig:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(DPO))
    return load_config(DpoConfig, file, overrides, check_files=False)


def lines(tmp_path: Path, overrides: list[str]) -> list[str]:
    try:
        load(tmp_path, overrides)
    except UserError as error:
        return [line.split(" [")[0] for line in str(error).splitlines()]
    return []


BROKEN = [
    (
        ["algorithm.loss=kto", "algorithm.label_smoothing=0.1"],
        "algorithm.label_smoothing: algorithm.loss = kto does not read it (got 0.1)",
    ),
    (
        ["algorithm.loss=simpo", "algorithm.length_normalization=false"],
        "algorithm.length_normalization: algorithm.loss = simpo always divides by the response length"
        " (got false)",
    ),
    (
        ["algorithm.loss=kto", "algorithm.length_normalization=true"],
        "algorithm.length_normalization: algorithm.loss = kto does not read it (got true)",
    ),
    (
        ["algorithm.simpo_gamma=0.5"],
        "algorithm.simpo_gamma: algorithm.loss = dpo does not read it (got 0.5)",
    ),
    (
        ["algorithm.loss=ipo", "algorithm.undesirable_weight=2"],
        "algorithm.undesirable_weight: algorithm.loss = ipo does not read it (got 2.0)",
    ),
    (
        ["algorithm.loss=simpo", "reference.path=other"],
        "reference.path: algorithm.loss = simpo needs no reference (got 'other')",
    ),
    (
        ["algorithm.loss=orpo", "reference.cache_dir=cache"],
        "reference.cache_dir: algorithm.loss = orpo needs no reference (got 'cache')",
    ),
    (
        ["algorithm.label_smoothing=0.5"],
        "algorithm.label_smoothing: expected a number >= 0 and < 0.5 (got 0.5)",
    ),
    (
        ['data.train.chosen_templates=["{other_answer}"]'],
        "data.train.chosen_templates: each template needs {answer} (got '{other_answer}')",
    ),
    (
        ['data.held_out.rejected_templates=["{answer}!", "no"]'],
        "data.held_out.rejected_templates: each template needs {answer} or {other_answer} (got 'no')",
    ),
    (
        ["packing.max_sequence_length=2049"],
        "packing.max_sequence_length: both responses of a pair share a microbatch: at most half of"
        " packing.max_tokens_per_microbatch = 4096 (got 2049)",
    ),
    (
        ["packing.max_sequence_length=4097"],
        "packing.max_sequence_length: a sequence of this length must fit into a microbatch,"
        " packing.max_tokens_per_microbatch = 4096 (got 4097)",
    ),
    (
        ["training.batch_size=101"],
        "training.batch_size: larger than the training set, data.train.size = 100 (got 101)",
    ),
    (
        ["training.batch_size=3", "parallel.num_processes=4"],
        "training.batch_size: a step of 3 pairs leaves some of 4 data-parallel ranks empty",
    ),
    (
        ["data.held_out=null", "training.validation_interval=5"],
        "training.validation_interval: needs data.held_out, which is not set: set it, or this one to 0 "
        "(got 5)",
    ),
    (
        ["training.validation_size=101"],
        "training.validation_size: larger than the held-out set, data.held_out.size = 100 (got 101)",
    ),
    (
        ["data.train={source: jsonl, path: p}", "data.held_out={source: jsonl, path: p}"],
        "data.held_out.path: is the same file as data.train.path (got 'p')",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), BROKEN)
def test_broken(tmp_path: Path, overrides: list[str], line: str) -> None:
    assert lines(tmp_path, overrides) == [line]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.label_smoothing=0.49", "algorithm.length_normalization=true"],
        ["algorithm.loss=ipo", "algorithm.length_normalization=false", "reference.path=other"],
        ["algorithm.loss=kto", "algorithm.desirable_weight=1.3", "reference.cache_dir=cache"],
        ["algorithm.loss=simpo", "algorithm.simpo_gamma=0", "algorithm.label_smoothing=0.1"],
        ["algorithm.loss=orpo", "algorithm.sft_coef=0", "algorithm.beta=0.5"],
        ["packing.max_sequence_length=2048", "training.batch_size=100"],
        ["training.batch_size=4", "parallel.num_processes=8", "parallel.tensor_parallel_size=2"],
    ],
)
def test_just_inside(tmp_path: Path, overrides: list[str]) -> None:
    assert lines(tmp_path, overrides) == []


def test_defaults_follow_the_loss() -> None:
    def resolved(loss: str) -> PreferenceOptions:
        return options_of(PreferenceAlgorithmConfig(loss=loss))  # type: ignore[arg-type]

    assert resolved("dpo") == PreferenceOptions("dpo", 0.1, simpo_gamma=1.0)
    assert resolved("ipo") == PreferenceOptions("ipo", 0.1, length_normalization=True, simpo_gamma=1.0)
    assert resolved("kto") == PreferenceOptions("kto", 0.1, simpo_gamma=1.0)
    assert resolved("simpo") == PreferenceOptions("simpo", 2.0, simpo_gamma=1.0)
    assert resolved("orpo") == PreferenceOptions("orpo", 0.1, sft_coef=1.0, simpo_gamma=1.0)
    given = PreferenceAlgorithmConfig(loss="orpo", beta=0.3, sft_coef=0.0)
    assert options_of(given) == PreferenceOptions("orpo", 0.3, sft_coef=0.0, simpo_gamma=1.0)


def test_what_follows_from_a_configuration(tmp_path: Path) -> None:
    model = {"max_position_embeddings": 8192}
    config = load(tmp_path, [])
    assert config.max_sequence_length(model) == 2048
    assert config.max_sequence_length({"max_position_embeddings": 512}) == 512
    assert load(tmp_path, ["packing.max_sequence_length=100"]).max_sequence_length(model) == 100
    assert "reference logprobs: once, before the first step" in config.describe(model)
    assert "pairs per step: 8" in config.describe(model)
    assert "reference logprobs: none (orpo)" in load(tmp_path, ["algorithm.loss=orpo"]).describe(model)


def test_reference_directories_are_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(DPO))
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "no such directory"), ("empty", "lacks config.json, weights")):
        with pytest.raises(UserError, match=rf"reference.path: .*{words}"):
            load_config(DpoConfig, file, [f"reference.path={tmp_path / name}"])
