"""Values derived from a configuration, against numbers computed by hand."""

from __future__ import annotations

from typing import Any

from megarl.config.grpo import GrpoAlgorithmConfig, GrpoConfig
from megarl.config.parallel import ParallelConfig


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
    assert sizes.data_parallel_size == 2


def test_passes() -> None:
    assert not GrpoAlgorithmConfig().needs_reference
    assert GrpoAlgorithmConfig(kl_coef=1e-3).needs_reference
    assert not GrpoAlgorithmConfig().needs_old_logprobs
    assert GrpoAlgorithmConfig(num_optimizer_steps_per_batch=2).needs_old_logprobs
    assert GrpoAlgorithmConfig(num_epochs_per_batch=2).needs_old_logprobs
    assert not GrpoAlgorithmConfig(num_epochs_per_batch=2, old_logprobs="rollout").needs_old_logprobs
    assert GrpoAlgorithmConfig(max_logprob_error=1).needs_old_logprobs
    kl_reward = GrpoAlgorithmConfig(kl_reward_coef=0.1)
    assert kl_reward.needs_old_logprobs and kl_reward.needs_reference


def test_longest_sequence() -> None:
    model = {"max_position_embeddings": 8192}
    assert grpo().max_sequence_length(model) == 4096
    assert grpo(packing={"max_tokens_per_microbatch": 10000}).max_sequence_length(model) == 8192
    assert grpo(packing={"max_sequence_length": 100}).max_sequence_length(model) == 100


def test_description() -> None:
    config = grpo(
        algorithm={"num_optimizer_steps_per_batch": 2, "num_epochs_per_batch": 3, "kl_coef": 0.1},
        parallel={"num_processes": 4, "tensor_parallel_size": 2},
    )
    assert config.num_optimizer_steps == 60
    assert config.describe({"max_position_embeddings": 512}) == [
        "trainer processes: 4, data_parallel_size: 2",
        "longest sequence: 512 tokens",
        "optimizer steps in all: 60",
        "sequences per step: 32 (8 prompts x 4 samples)",
        "samples per optimizer step: 16, optimizer steps per rollout batch: 6",
        "old logprobs: one forward pass per rollout batch",
        "reference logprobs: one forward pass per rollout batch",
        "samples with advantage 0: computed (algorithm.kl_coef needs them)",
    ]
    assert grpo().describe(None)[-3:] == [
        "old logprobs: pass skipped (one optimizer step per rollout batch: old = current)",
        "reference logprobs: pass skipped (algorithm.kl_coef is 0)",
        "samples with advantage 0: skipped",
    ]


def test_what_gives_samples_without_an_advantage_a_gradient() -> None:
    assert grpo().why_zero_advantages_train == ""
    for change in (
        {"num_optimizer_steps_per_batch": 2},
        {"off_policy_correction": "tis", "off_policy_high": 2},
    ):
        assert grpo(algorithm=change).why_zero_advantages_train == ""
    for name in ("kl_coef", "kl_reward_coef", "entropy_coef", "positive_nll_coef", "max_logprob_error"):
        assert grpo(algorithm={name: 0.1}).why_zero_advantages_train == f"algorithm.{name} needs them"
    for name, value in (("aux_loss_coef", 0.1), ("aux_loss_coef", None), ("bias_update_rate", 1e-3)):
        assert grpo(router={name: value}).why_zero_advantages_train == f"router.{name} needs them"
    off = grpo(algorithm={"skip_zero_advantages": "off"})
    assert off.why_zero_advantages_train == "algorithm.skip_zero_advantages is off"
