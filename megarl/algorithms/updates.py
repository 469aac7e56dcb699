"""Optimizer steps of the policy, as grpo and ppo take them."""

from __future__ import annotations

from megarl.algorithms.run import Run
from megarl.config.online import OnlineConfig
from megarl.losses.base import Loss
from megarl.records import PackedBatch
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import TrainStepResult, train_step


def policy_step(
    policy: Trainer, batches: list[PackedBatch], loss: Loss, config: OnlineConfig
) -> TrainStepResult:
    """One optimizer step on the distribution that the engine draws from."""
    rollout = config.rollout
    return train_step(
        policy,
        batches,
        loss,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )


def train_speed(run: Run, num_tokens: float, num_epochs: int) -> dict[str, float]:
    """Tokens trained on per second of the train phase, all passes over them counted."""
    return {"tokens_per_second_train": num_tokens * num_epochs / run.timers.seconds("train")}
