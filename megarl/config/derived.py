"""What follows from a configuration: sizes, counts, and which passes a step needs.

The loops and ``--dry-run`` ask the same functions, so what is printed is what runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarl.config.distill import DistillAlgorithmConfig, DistillConfig
from megarl.config.ppo import PpoAlgorithmConfig, PpoConfig
from megarl.config.preference import DpoConfig, PreferenceAlgorithmConfig, RmConfig
from megarl.config.run import ProfileConfig
from megarl.config.schema import (
    EvalConfig,
    EvaluationConfig,
    GrpoAlgorithmConfig,
    GrpoConfig,
    ParallelConfig,
    SftConfig,
)

OnlineRoot = GrpoConfig | PpoConfig | DistillConfig
TrainingConfig = SftConfig | DpoConfig | RmConfig | OnlineRoot
AnyConfig = TrainingConfig | EvalConfig


def data_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that see different sequences."""
    return parallel.num_processes // model_parallel_size(parallel)


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that together hold one copy of the model and one sequence."""
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size


def optimizer_steps_per_batch(
    algorithm: GrpoAlgorithmConfig | PpoAlgorithmConfig | DistillAlgorithmConfig,
) -> int:
    """Optimizer steps taken on one rollout batch, over all its epochs."""
    return algorithm.num_optimizer_steps_per_batch * algorithm.num_epochs_per_batch


def num_optimizer_steps(config: TrainingConfig) -> int:
    """The (policy's) optimizer steps of the whole run: the length of the learning-rate schedule."""
    if isinstance(config, PpoConfig):
        steps = config.training.num_steps - config.critic.warmup_steps
        return steps * optimizer_steps_per_batch(config.algorithm)
    if isinstance(config, GrpoConfig | DistillConfig):
        return config.training.num_steps * optimizer_steps_per_batch(config.algorithm)
    return config.training.num_steps


def profiled_steps(profile: ProfileConfig) -> frozenset[int]:
    """The steps that are traced."""
    steps: set[int] = set()
    for item in profile.steps:
        if isinstance(item, str):
            first, last = map(int, item.split("-"))
            steps |= set(range(first, last + 1))
        else:
            steps.add(item)
    return frozenset(steps)


def needs_reference(algorithm: GrpoAlgorithmConfig | PpoAlgorithmConfig) -> bool:
    """Whether reference logprobs enter the loss or the reward."""
    if isinstance(algorithm, PpoAlgorithmConfig):
        return algorithm.kl_reward_coef > 0
    return algorithm.kl_coef > 0 or algorithm.kl_reward_coef > 0


def uses_reference(algorithm: PreferenceAlgorithmConfig) -> bool:
    """Whether the loss compares with a reference's logprobs."""
    return algorithm.loss in ("dpo", "ipo", "kto")


def needs_old_logprobs(algorithm: GrpoAlgorithmConfig | PpoAlgorithmConfig) -> bool:
    """Whether old logprobs need a pass of their own.

    With one optimizer step per batch the trainer's logprobs before it are the current ones, detached: a
    pass is made only for what must know them before the step. The engine's are there already.
    """
    if isinstance(algorithm, PpoAlgorithmConfig):
        return algorithm.kl_reward_coef > 0 or optimizer_steps_per_batch(algorithm) > 1
    if algorithm.old_logprobs == "rollout":
        return False
    asked = algorithm.kl_reward_coef > 0 or algorithm.max_logprob_error is not None
    return asked or optimizer_steps_per_batch(algorithm) > 1


def has_ratios(algorithm: GrpoAlgorithmConfig) -> bool:
    """Whether the ratio to the old policy is ever another number than 1."""
    return algorithm.old_logprobs == "rollout" or optimizer_steps_per_batch(algorithm) > 1


def why_no_old_pass(algorithm: GrpoAlgorithmConfig | PpoAlgorithmConfig) -> str:
    """For a log line, where needs_old_logprobs is false."""
    if isinstance(algorithm, GrpoAlgorithmConfig) and algorithm.old_logprobs == "rollout":
        return "they are the engine's"
    return "one optimizer step per rollout batch: old = current"


def why_zero_advantages_train(config: GrpoConfig) -> str:
    """For a log line, why samples whose advantage is 0 are computed all the same; "" where they are not.

    With that advantage the policy loss and its gradient are 0 whatever the ratio; these settings add a term
    that is not, or make the advantages wait for a pass over all samples.
    """
    algorithm, router = config.algorithm, config.router
    if algorithm.skip_zero_advantages == "off":
        return "algorithm.skip_zero_advantages is off"
    for name in ("kl_coef", "kl_reward_coef", "entropy_coef", "positive_nll_coef", "max_logprob_error"):
        if getattr(algorithm, name):
            return f"algorithm.{name} needs them"
    for name in ("aux_loss_coef", "bias_update_rate"):
        if getattr(router, name) != 0:  # null: config.json's, which is above 0
            return f"router.{name} needs them"
    return ""


def evaluates(evaluation: EvaluationConfig) -> bool:
    """Whether a run ever evaluates."""
    return bool(evaluation.interval) or evaluation.at_start or evaluation.at_end


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a Megatron distributed checkpoint, or has a tracker file that names one."""
    return any((Path(path) / name).is_file() for name in (".metadata", "latest_checkpointed_iteration.txt"))


def read_model_config(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face directory (OSError or ValueError where it cannot be read)."""
    value = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("config.json does not hold an object")
    return value


def max_sequence_length(config: AnyConfig, model_config: dict[str, Any]) -> int:
    """Longest prompt + response in tokens.

    packing.max_sequence_length where it is set; else what the model's positions and, in training,
    the token budget of a microbatch both allow (half of it where pairs share one).
    """
    positions = int(model_config["max_position_embeddings"])
    if isinstance(config, EvalConfig):
        return positions
    explicit = config.packing.max_sequence_length
    budget = config.packing.max_tokens_per_microbatch // (
        2 if isinstance(config, DpoConfig | RmConfig) else 1
    )
    return explicit if explicit is not None else min(positions, budget)


def describe(config: AnyConfig, model_config: dict[str, Any] | None) -> list[str]:
    """Lines for --dry-run: what the configuration amounts to."""
    lines = []
    if not isinstance(config, EvalConfig):
        size = data_parallel_size(config.parallel)
        lines.append(f"trainer processes: {config.parallel.num_processes}, data_parallel_size: {size}")
    if model_config is not None and "max_position_embeddings" in model_config:
        lines.append(f"longest sequence: {max_sequence_length(config, model_config)} tokens")
    if isinstance(config, SftConfig):
        lines.append(f"sequences per step: {config.training.batch_size}")
    if isinstance(config, DpoConfig | RmConfig):
        lines.append(f"pairs per step: {config.training.batch_size}")
    if isinstance(config, DpoConfig):
        needs = uses_reference(config.algorithm)
        lines.append(
            "reference logprobs: "
            + ("once, before the first step" if needs else f"none ({config.algorithm.loss})")
        )
    if not isinstance(config, EvalConfig):
        lines.append(f"optimizer steps in all: {num_optimizer_steps(config)}")
        if (lora := config.lora) is not None:
            targets = ", ".join(lora.target_modules)
            lines.append(f"trained: adapters of rank {lora.rank} on {targets}; exported: {lora.export}")
    if isinstance(config, OnlineRoot):
        lines += _describe_online(config)
    if isinstance(config, OnlineRoot | EvalConfig) and config.rollout.engine.data_parallel_size > 1:
        engine = config.rollout.engine
        lines.append(
            f"engines: {engine.data_parallel_size}, tensor_parallel_size: {engine.tensor_parallel_size} each"
        )
    return lines


def _describe_online(config: OnlineRoot) -> list[str]:
    rollout, algorithm = config.rollout, config.algorithm
    samples = rollout.num_prompts_per_step * rollout.num_generations_per_prompt
    per_update = samples // algorithm.num_optimizer_steps_per_batch
    lines = [
        f"sequences per step: {samples} ({rollout.num_prompts_per_step} prompts x "
        f"{rollout.num_generations_per_prompt} samples)",
        f"samples per optimizer step: {per_update}, optimizer steps per rollout batch: "
        f"{optimizer_steps_per_batch(algorithm)}",
    ]
    if isinstance(config, DistillConfig):
        return [*lines, f"teacher: {config.teacher.path}"]
    assert not isinstance(algorithm, DistillAlgorithmConfig)
    if needs_old_logprobs(algorithm):
        lines.append("old logprobs: one forward pass per rollout batch")
    else:
        lines.append(f"old logprobs: pass skipped ({why_no_old_pass(algorithm)})")
    if needs_reference(algorithm):
        lines.append("reference logprobs: one forward pass per rollout batch")
    else:
        name = "kl_coef" if isinstance(config, GrpoConfig) else "kl_reward_coef"
        lines.append(f"reference logprobs: pass skipped (algorithm.{name} is 0)")
    if isinstance(config, GrpoConfig):
        why = why_zero_advantages_train(config)
        lines.append(f"samples whose advantage is 0: {f'trained on ({why})' if why else 'not computed'}")
    if isinstance(config, PpoConfig):
        lines.append(
            f"critic: {config.critic.path or config.model.path}, "
            f"{config.training.num_steps * optimizer_steps_per_batch(algorithm)} optimizer steps"
        )
    return lines
