"""Facts that follow from a configuration, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

from megarl.config.derived import (
    data_parallel_size,
    describe,
    max_sequence_length,
    needs_old_logprobs,
    needs_reference,
    num_optimizer_steps,
    why_zero_advantages_train,
)
from megarl.config.schema import GrpoAlgorithmConfig, GrpoConfig, ParallelConfig


def grpo(**changes: Any) -> GrpoConfig:
    gym = {"source": "reasoning_gym", "task": "chain_sum"}
    data = {
        "run": {"dir": "r"},
        "model": {"path": "m"},
        "optimizer": {"lr": 1e-3},
        "data": {"train": gym},
        "rollout": {"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 16},
        "training": {"num_steps": 10},
    }
    return GrpoConfig.model_validate(data | changes)


def test_data_parallel_size() -> None:
    sizes = ParallelConfig(
        num_processes=48, tensor_parallel_size=2, pipeline_parallel_size=3, context_parallel_size=4
    )
    assert data_parallel_size(sizes) == 2


def test_passes() -> None:
    assert not needs_reference(GrpoAlgorithmConfig())
    assert needs_reference(GrpoAlgorithmConfig(kl_coef=1e-3))
    assert not needs_old_logprobs(GrpoAlgorithmConfig())
    assert needs_old_logprobs(GrpoAlgorithmConfig(num_optimizer_steps_per_batch=2))
    assert needs_old_logprobs(GrpoAlgorithmConfig(num_epochs_per_batch=2))
    assert not needs_old_logprobs(GrpoAlgorithmConfig(num_epochs_per_batch=2, old_logprobs="rollout"))
    assert needs_old_logprobs(GrpoAlgorithmConfig(max_logprob_error=1))
    kl_reward = GrpoAlgorithmConfig(kl_reward_coef=0.1)
    assert needs_old_logprobs(kl_reward) and needs_reference(kl_reward)


def test_longest_sequence() -> None:
    model = {"max_position_embeddings": 8192}
    assert max_sequence_length(grpo(), model) == 4096
    assert max_sequence_length(grpo(packing={"max_tokens_per_microbatch": 10000}), model) == 8192
    assert max_sequence_length(grpo(packing={"max_sequence_length": 100}), model) == 100


def test_description() -> None:
    config = grpo(
        algorithm={"num_optimizer_steps_per_batch": 2, "num_epochs_per_batch": 3, "kl_coef": 0.1},
        parallel={"num_processes": 4, "tensor_parallel_size": 2},
    )
    assert num_optimizer_steps(config) == 60
    assert describe(config, {"max_position_embeddings": 512}) == [
        "trainer processes: 4, data_parallel_size: 2",
        "longest sequence: 512 tokens",
        "optimizer steps in all: 60",
        "sequences per step: 32 (8 prompts x 4 samples)",
        "samples per optimizer step: 16, optimizer steps per rollout batch: 6",
        "old logprobs: one forward pass per rollout batch",
        "reference logprobs: one forward pass per rollout batch",
        "samples whose advantage is 0: trained on (algorithm.kl_coef needs them)",
    ]
    assert describe(grpo(), None)[-3:] == [
        "old logprobs: pass skipped (one optimizer step per rollout batch: old = current)",
        "reference logprobs: pass skipped (algorithm.kl_coef is 0)",
        "samples whose advantage is 0: not computed",
    ]


def test_what_gives_samples_without_an_advantage_a_gradient() -> None:
    assert why_zero_advantages_train(grpo()) == ""
    for change in (
        {"num_optimizer_steps_per_batch": 2},
        {"off_policy_correction": "tis", "off_policy_high": 2},
    ):
        assert why_zero_advantages_train(grpo(algorithm=change)) == ""
    for name in ("kl_coef", "kl_reward_coef", "entropy_coef", "positive_nll_coef", "max_logprob_error"):
        assert why_zero_advantages_train(grpo(algorithm={name: 0.1})) == f"algorithm.{name} needs them"
    for name, value in (("aux_loss_coef", 0.1), ("aux_loss_coef", None), ("bias_update_rate", 1e-3)):
        assert why_zero_advantages_train(grpo(router={name: value})) == f"router.{name} needs them"
    off = grpo(algorithm={"skip_zero_advantages": "off"})
    assert why_zero_advantages_train(off) == "algorithm.skip_zero_advantages is off"
