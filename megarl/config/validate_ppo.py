"""Rules about PPO and its critic (see :mod:`megarl.config.validate` for what a rule is)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import optimizer_steps_per_batch
from megarl.config.ppo import PpoConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _clip(config: PpoConfig) -> Violations:
    if config.algorithm.clip_ratio_low >= 1:
        yield Violation(
            ("algorithm", "clip_ratio_low"),
            "must be below 1: ratios are positive, so 1 - clip_ratio_low <= 0 never clips"
            f" (got {config.algorithm.clip_ratio_low})",
        )


def _no_ratio(config: PpoConfig) -> Violations:
    algorithm = config.algorithm
    if algorithm.clip_ratio_c is not None and optimizer_steps_per_batch(algorithm) == 1:
        yield Violation(
            ("algorithm", "clip_ratio_c"),
            "has no effect: with one optimizer step per rollout batch every ratio is 1"
            f" (got {algorithm.clip_ratio_c})",
            (("algorithm", "num_optimizer_steps_per_batch"), ("algorithm", "num_epochs_per_batch")),
        )


def _critic_warmup(config: PpoConfig) -> Violations:
    if config.critic.warmup_steps >= config.training.num_steps:
        yield Violation(
            ("critic", "warmup_steps"),
            f"leaves the policy none of the run's {config.training.num_steps} steps"
            f" (got {config.critic.warmup_steps})",
            (("training", "num_steps"),),
        )


def _critic_schedule(config: PpoConfig) -> Violations:
    optimizer = config.critic.optimizer
    if optimizer is None:
        return
    steps = config.training.num_steps * optimizer_steps_per_batch(config.algorithm)
    if optimizer.lr_warmup_steps > steps:
        yield Violation(
            ("critic", "optimizer", "lr_warmup_steps"),
            f"longer than the critic's {steps} optimizer steps (got {optimizer.lr_warmup_steps})",
            (("training", "num_steps"),),
        )
    if optimizer.min_lr > optimizer.lr:
        yield Violation(
            ("critic", "optimizer", "min_lr"),
            f"must not exceed critic.optimizer.lr = {optimizer.lr} (got {optimizer.min_lr})",
            (("critic", "optimizer", "lr"),),
        )


def _truncated_sampling(config: PpoConfig) -> Violations:
    rollout = config.rollout
    for name, off in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(rollout, name)
        if value == off:
            continue
        if optimizer_steps_per_batch(config.algorithm) > 1 or config.algorithm.kl_reward_coef > 0:
            yield Violation(
                ("rollout", name),
                "logprobs are taken over the tokens that the sampling policy could draw, which its weights"
                " tell only before the first of several optimizer steps, and the reference's never"
                f" (got {value})",
                (("algorithm", "num_epochs_per_batch"), ("algorithm", "kl_reward_coef")),
            )


def _asynchronous(config: PpoConfig) -> Violations:
    if config.rollout.max_staleness:
        yield Violation(
            ("rollout", "max_staleness"),
            "not for ppo: values and old logprobs are of the present weights"
            f" (got {config.rollout.max_staleness})",
        )


def _router_replay(config: PpoConfig) -> Violations:
    if config.rollout.router_replay:
        yield Violation(
            ("rollout", "router_replay"),
            "not for ppo: the critic would be given the experts that the policy chose (got true)",
        )


def _checkpoints(config: PpoConfig) -> Violations:
    if config.checkpoint.async_save:
        yield Violation(
            ("checkpoint", "async_save"),
            "not for ppo: its two models are saved one after the other (got true)",
        )


PPO_RULES: list[Callable[[PpoConfig], Violations]] = [
    _clip,
    _no_ratio,
    _critic_warmup,
    _critic_schedule,
    _truncated_sampling,
    _asynchronous,
    _router_replay,
    _checkpoints,
]
