"""Settings of `megarl ppo`; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.hub import ModelPath
from megarl.config.metric_names import PPO
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problems,
    Section,
    rule,
)

Share = Annotated[float, Field(ge=0, le=1)]


class PpoAlgorithmConfig(OnlineAlgorithm):
    """PPO (Schulman et al. 2017, arXiv:1707.06347), token by token."""

    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of GAE (arXiv:1506.02438); 1: advantage = return - value."""
    normalize_advantages: bool = True
    """Standardise advantages over all tokens of the rollout batch."""
    clip_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_low get no gradient."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip c (arXiv:1912.09729): the loss of an advantage A < 0 is at most -A c (null: off; often 3)."""
    kl_reward_coef: NonNegativeFloat = 0.0
    """KL penalty per token, coef * (old - ref logprob) (arXiv:1909.08593); 0 skips the reference."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """Policy and value loss. token: sum over tokens / T; sequence: mean per sequence, sum / S."""
    num_optimizer_steps_per_batch: PositiveInt = 1
    """Mini-batches of a rollout batch, split by prompt: optimizer steps per epoch."""
    num_epochs_per_batch: PositiveInt = 1
    """Epochs over the rollout batch."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the reward."""
        return self.kl_reward_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether old logprobs need a forward pass: for the KL penalty or several optimizer steps."""
        return self.kl_reward_coef > 0 or self.optimizer_steps_per_batch > 1

    @rule
    def _ratios(self) -> Problems:
        """`clip_low` is below 1; `dual_clip` needs several optimizer steps per rollout batch."""
        if self.optimizer_steps_per_batch == 1:
            why = "has no effect: with one optimizer step per rollout batch every ratio is 1"
            steps = "num_optimizer_steps_per_batch", "num_epochs_per_batch"
            yield from self.unused("dual_clip", why, *steps)
        yield from self.lower_clip(self.clip_low)


class CriticConfig(Section):
    """The critic, which predicts each token's return; it has the policy's parallel layout and packing."""

    path: ModelPath | None = None
    """Language model (directory or hub id), or `megarl rm`'s (its head is kept); null: model.path."""
    optimizer: OptimizerConfig | None = None
    """The critic's optimizer and schedule; null: the policy's settings, over the critic's steps."""
    value_clip: PositiveFloat | None = 0.2
    """Clip values to within this distance of the values before the update (null: off)."""
    warmup_steps: NonNegativeInt = 0
    """Initial steps that train the critic only."""


class PpoConfig(OnlineConfig):
    """Root of `megarl ppo`."""

    algorithm: PpoAlgorithmConfig = PpoAlgorithmConfig()
    critic: CriticConfig = CriticConfig()

    metric_names: ClassVar[frozenset[str]] = PPO
    refused: ClassVar[dict[str, str]] = {
        "rollout.max_staleness": "not for ppo: values and old logprobs are those of the current weights",
        "rollout.router_replay": "not for ppo: it would replay the policy's experts in the critic",
        "checkpoint.async_save": "not for ppo: policy and critic are saved in turn",
    }

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the policy in the run; none during the critic's warm-up."""
        steps = self.training.num_steps - self.critic.warmup_steps
        return steps * self.algorithm.optimizer_steps_per_batch

    @property
    def num_critic_steps(self) -> int:
        """Optimizer steps of the critic in the run."""
        return self.training.num_steps * self.algorithm.optimizer_steps_per_batch

    def describe_algorithm(self) -> list[str]:
        """Return the lines on forward passes and the critic."""
        algorithm, one = self.algorithm, "one forward pass per rollout batch"
        old = "pass skipped (one optimizer step per rollout batch: old = current)"
        reference = "pass skipped (algorithm.kl_reward_coef is 0)"
        return [
            f"old logprobs: {one if algorithm.needs_old_logprobs else old}",
            f"reference logprobs: {one if algorithm.needs_reference else reference}",
            f"critic: {self.critic.path or self.model.path}, {self.num_critic_steps} optimizer steps",
        ]

    def notes(self) -> list[str]:
        """Return a line per valid setting that may not do what was meant, for the start of a run."""
        own, steps = self.critic.optimizer, self.num_critic_steps
        return [*super().notes(), *(own.notes("critic.optimizer", steps) if own is not None else [])]

    @rule
    def _critic_steps(self) -> Problems:
        """`critic.warmup_steps` is below `training.num_steps`."""
        last = self.training.num_steps
        if (warmup := self.critic.warmup_steps) >= last:
            reason = f"the policy trains in none of the run's {last} steps (got {warmup})"
            yield "critic.warmup_steps", reason, "training.num_steps"

    @rule
    def _truncated_sampling(self) -> Problems:
        """`rollout.top_p` and `top_k` need one optimizer step per rollout batch and
        `algorithm.kl_reward_coef: 0`."""
        asked = self.algorithm.needs_old_logprobs
        why = (
            "logprobs are normalised over the sampling policy's support, which is known only before the first"
            " of several optimizer steps, and never to the reference"
        )
        related = "algorithm.num_epochs_per_batch", "algorithm.kl_reward_coef"
        if asked:
            yield from self.unused("rollout.top_p rollout.top_k", why, *related)
