"""GRPO options that would have no effect are rejected; the guide's presets are valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.grpo import GrpoConfig
from megarl.config.section import find_violations

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "grpo.md"


def config(algorithm: dict[str, Any], rollout: dict[str, Any] | None = None) -> GrpoConfig:
    return GrpoConfig.model_validate(
        {
            "run": {"dir": "runs/x"},
            "model": {"path": "models/x"},
            "data": {
                "train": {"source": "reasoning_gym", "task": "chain_sum", "seed": 1, "size": 100},
                "held_out": {"source": "reasoning_gym", "task": "chain_sum", "seed": 1000, "size": 300},
            },
            "rollout": {"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 64}
            | (rollout or {}),
            "optimizer": {"lr": 1e-6},
            "algorithm": algorithm,
            "training": {"num_steps": 10},
        }
    )


def lines(algorithm: dict[str, Any], rollout: dict[str, Any] | None = None) -> list[str]:
    return [f"{'.'.join(v.path)}: {v.message}" for v in find_violations(config(algorithm, rollout))]


ONE = {"num_generations_per_prompt": 1}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"objective": "cispo"}, {}, "algorithm.objective: has no effect: with one optimizer step"),
    ({"ratio_level": "sequence"}, {}, "algorithm.ratio_level: has no effect"),
    ({"dual_clip": 3.0}, {}, "algorithm.dual_clip: has no effect"),
    ({"max_generation_batches": 4}, {}, "algorithm.max_generation_batches: has no effect: algorithm.dynamic"),
    ({"overlong_penalty": 0.5}, {}, "algorithm.overlong_penalty: has no effect: algorithm.overlong_buffer"),
    ({"kl_reward_level": "sequence"}, {}, "algorithm.kl_reward_level: has no effect: algorithm.kl_reward"),
    ({"loss_length": 9}, {}, "algorithm.loss_length: has no effect: algorithm.loss_aggregation is token"),
    ({"overlong_buffer": 65}, {}, "algorithm.overlong_buffer: must not exceed rollout.max_new_tokens = 64"),
    (
        {"filter_overlong": True, "kl_reward_coef": 0.1, "kl_reward_level": "sequence"},
        {},
        "algorithm.filter_overlong: cannot be combined with algorithm.kl_reward_level",
    ),
    (
        {"old_logprobs": "rollout", "off_policy_correction": "tis", "off_policy_high": 2},
        {},
        "algorithm.off_policy_correction: compares old with rollout logprobs",
    ),
    ({"old_logprobs": "rollout", "max_logprob_error": 1}, {}, "algorithm.max_logprob_error: compares old"),
    (
        {"off_policy_correction": "tis", "off_policy_high": 2, "off_policy_sequence_weight": "product"},
        {},
        "algorithm.off_policy_sequence_weight: algorithm.off_policy_correction = tis does not read it",
    ),
    (
        {"off_policy_correction": "tis", "off_policy_high": 2, "off_policy_denominators": "kept"},
        {},
        "algorithm.off_policy_denominators: has no effect: algorithm.off_policy_correction = tis drops",
    ),
    (
        {"off_policy_correction": "tis", "off_policy_high": 2, "off_policy_low": 1.5},
        {},
        "algorithm.off_policy_low: off_policy_low <= 1 <= off_policy_high must hold",
    ),
    (
        {"off_policy_correction": "sequence_mask_tis", "off_policy_high": 2},
        {},
        "algorithm.off_policy_low: missing, algorithm.off_policy_correction = sequence_mask_tis needs it",
    ),
    (
        {"off_policy_correction": "icepop", "off_policy_low": 0, "off_policy_high": 2}
        | {"off_policy_token_high": 3},
        {},
        "algorithm.off_policy_token_high: algorithm.off_policy_correction = icepop does not read it",
    ),
    (
        {"off_policy_correction": "sequence_mask_tis", "off_policy_low": 0.9, "off_policy_high": 2}
        | {"off_policy_token_high": 0.5},
        {},
        "algorithm.off_policy_token_high: must be at least 1, or tokens with a ratio of 1",
    ),
    ({"reward_weights": {"a": 0}}, {}, "algorithm.reward_weights: names no reward of a weight other than 0"),
    (
        {"reward_weights": {"a": 1}, "overlong_buffer": 4},
        {},
        "algorithm.overlong_buffer: is taken off the one reward that algorithm.reward_weights does not read",
    ),
    ({"objective": "sapo"}, {}, "algorithm.objective: has no effect: with one optimizer step"),
    ({"drift_coef": 0.1}, {}, "algorithm.drift_coef: has no effect: with one optimizer step"),
    ({"sapo_temperature_neg": 2}, {}, "algorithm.sapo_temperature_neg: algorithm.objective = clip does not"),
    ({"vespo_k_pos": 1}, {}, "algorithm.vespo_k_pos: algorithm.objective = clip does not read it"),
    (
        {"objective": "sapo", "old_logprobs": "rollout", "clip_high": 0.3},
        {},
        "algorithm.clip_high: algorithm.objective = sapo does not read it",
    ),
    (
        {"objective": "dppo", "old_logprobs": "rollout", "ratio_level": "sequence"},
        {},
        "algorithm.ratio_level: algorithm.objective = dppo compares tokens' probabilities",
    ),
    (
        {
            "objective": "vespo",
            "num_epochs_per_batch": 2,
            "off_policy_correction": "tis",
            "off_policy_high": 2,
        },
        {},
        "algorithm.off_policy_correction: algorithm.objective = vespo has its own ratio of a sequence",
    ),
    (
        {"objective": "dppo", "old_logprobs": "rollout", "dual_clip": 3},
        {},
        "algorithm.dual_clip: applies to algorithm.objective = clip only, not to dppo",
    ),
    ({"log_ratio_clamp": 20}, {}, "algorithm.log_ratio_clamp: has no effect: every ratio is 1 with one"),
    ({"kl_input_clamp_value": 20}, {}, "algorithm.kl_input_clamp_value: has no effect: algorithm.kl_coef"),
    ({"kl_output_clamp_value": 9}, {}, "algorithm.kl_output_clamp_value: has no effect: algorithm.kl_coef"),
    ({"kl_reward_coef": 0.1}, {"top_p": 0.9}, "rollout.top_p: algorithm.kl_reward_coef uses logprobs"),
    ({}, {"max_staleness": 1, "top_p": 0.9}, "rollout.max_staleness: rollout.top_p makes the trainer's"),
    ({}, {"max_staleness": 1, "top_k": 9}, "rollout.max_staleness: rollout.top_k makes the trainer's"),
    ({"dynamic_sampling": True}, {"max_staleness": 2}, "rollout.max_staleness: algorithm.dynamic_sampling"),
    ({"max_logprob_error": 0.1}, {"top_k": 9}, "rollout.top_k: algorithm.max_logprob_error uses logprobs"),
    ({"baseline": "none"}, ONE, "rollout.num_generations_per_prompt: a group of one has no standard dev"),
    (
        {"baseline": "none", "normalize_std": False, "dynamic_sampling": True},
        ONE,
        "rollout.num_generations_per_prompt: algorithm.dynamic_sampling needs groups",
    ),
]


def test_offload_and_overlap_exclude_each_other() -> None:
    both = config({}, {"max_staleness": 1})
    asleep = both.model_copy(update={"weights": both.weights.model_copy(update={"offload": ["gradients"]})})
    assert find_violations(both) == []
    [violation] = find_violations(asleep)
    assert violation.message.startswith("weights.offload needs engine and trainer to take turns")


@pytest.mark.parametrize(("algorithm", "rollout", "start"), REFUSED)
def test_refused(algorithm: dict[str, Any], rollout: dict[str, Any], start: str) -> None:
    [line] = lines(algorithm, rollout)
    assert line.startswith(start)


@pytest.mark.parametrize(
    ("algorithm", "rollout"),
    [
        ({"baseline": "none", "normalize_std": False, "normalize_batch": True}, ONE),
        ({"objective": "cispo", "clip_low": 1.0, "old_logprobs": "rollout"}, {}),
        ({"filter_overlong": True, "kl_reward_coef": 0.1}, {}),
        ({"old_logprobs": "rollout", "kl_reward_coef": 0.1}, {}),
        ({"overlong_buffer": 64}, {}),
        ({"off_policy_correction": "tis", "off_policy_high": 2, "log_ratio_clamp": 20}, {}),
        ({"off_policy_correction": "sequence_tis", "off_policy_low": 1, "off_policy_high": 1.5}, {}),
        (
            {"off_policy_correction": "sequence_icepop", "off_policy_low": 0, "off_policy_high": 3}
            | {"off_policy_sequence_weight": "product", "off_policy_denominators": "kept"},
            {},
        ),
        ({"kl_coef": 0.1, "kl_estimator": "k1", "kl_gradient": "unbiased"}, {}),
        ({"kl_coef": 0.1, "kl_gradient": "unbiased_rollout", "log_ratio_clamp": 20}, {}),
    ],
)
def test_just_inside(algorithm: dict[str, Any], rollout: dict[str, Any]) -> None:
    assert lines(algorithm, rollout) == []


def test_presets_of_the_guide() -> None:
    blocks = [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    ]
    presets = {name: part for block in blocks for name, part in block.items()}
    names = (
        "grpo dr_grpo dapo gspo cispo sapo dppo vespo rloo opo remax gdpo reinforce_plus_plus"
        " reinforce_baseline"
    )
    assert presets.keys() == set(names.split())
    for name, part in presets.items():
        assert part.keys() == {"algorithm"}, name
        assert lines(part["algorithm"], {"num_generations_per_prompt": 4}) == [], name
    algorithms = {name: config(part["algorithm"]).algorithm for name, part in presets.items()}
    assert not algorithms["dr_grpo"].normalize_std
    assert algorithms["dr_grpo"].loss_aggregation == "fixed_length"
    assert algorithms["dapo"].dynamic_sampling and algorithms["dapo"].clip_high == 0.28
    assert algorithms["rloo"].baseline == "leave_one_out" and not algorithms["rloo"].normalize_std
    assert algorithms["reinforce_plus_plus"].normalize_batch
