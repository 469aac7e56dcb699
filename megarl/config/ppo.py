"""Settings of `megarl ppo`: policy gradients with a critic; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problems,
    Section,
    rule,
)

Share = Annotated[float, Field(ge=0, le=1)]


class PpoAlgorithmConfig(OnlineAlgorithm):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) on tokens."""

    gamma: Share = 1.0
    """Discount of one token."""
    gae_lambda: Share = 0.95
    """Weight of longer returns in the advantages (GAE, arXiv:1506.02438); 1: return minus value."""
    normalize_advantages: bool = True
    """Advantages of the rollout batch's tokens to mean 0 and deviation 1."""
    clip_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_low get no gradient."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip (arXiv:1912.09729): the loss of an advantage A < 0 is at most -A c (null: off; often 3)."""
    kl_reward_coef: NonNegativeFloat = 0.0
    """Each token's reward loses so much of old - ref logprob (arXiv:1909.08593); 0 skips the reference."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """Of both losses. token: sum over tokens / T; sequence: mean over each sequence's tokens, then / S."""
    num_optimizer_steps_per_batch: PositiveInt = 1
    """Minibatches of a rollout batch: optimizer steps per pass, each on its own share of the prompts."""
    num_epochs_per_batch: PositiveInt = 1
    """Passes over the rollout batch."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the reward."""
        return self.kl_reward_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether old logprobs need a pass of their own: for the reward, or for ratios other than 1."""
        return self.kl_reward_coef > 0 or self.optimizer_steps_per_batch > 1

    @rule
    def _ratios(self) -> Problems:
        if self.optimizer_steps_per_batch == 1:
            why = "has no effect: with one optimizer step per rollout batch every ratio is 1"
            steps = "num_optimizer_steps_per_batch", "num_epochs_per_batch"
            yield from self.unused("dual_clip", why, *steps)
        yield from self.lower_clip(self.clip_low)


class CriticConfig(Section):
    """The model that predicts each token's return; it shares the policy's parallel layout and packing."""

    path: PathText | None = None
    """Language model, or reward model of `megarl rm` (its head is kept); null is model.path."""
    optimizer: OptimizerConfig | None = None
    """Its own optimizer and schedule; null is the policy's section, over the critic's steps."""
    value_clip: PositiveFloat | None = 0.2
    """How far the loss follows a value from what it was before the batch (null: all the way)."""
    warmup_steps: NonNegativeInt = 0
    """First steps in which the critic alone learns."""


class PpoConfig(OnlineConfig):
    """Root of `megarl ppo`."""

    algorithm: PpoAlgorithmConfig = PpoAlgorithmConfig()
    critic: CriticConfig = CriticConfig()

    refused: ClassVar[dict[str, str]] = {
        "rollout.max_staleness": "not for ppo: values and old logprobs are of the present weights",
        "rollout.router_replay": "not for ppo: the critic would be given the experts that the policy chose",
        "checkpoint.async_save": "not for ppo: its two models are saved one after the other",
    }

    @property
    def num_optimizer_steps(self) -> int:
        """The policy's: it has none in the critic's warm-up."""
        steps = self.training.num_steps - self.critic.warmup_steps
        return steps * self.algorithm.optimizer_steps_per_batch

    @property
    def num_critic_steps(self) -> int:
        """The critic's optimizer steps of the whole run."""
        return self.training.num_steps * self.algorithm.optimizer_steps_per_batch

    def describe_algorithm(self) -> list[str]:
        """Which passes are made and skipped, and the critic."""
        algorithm, one = self.algorithm, "one forward pass per rollout batch"
        old = "pass skipped (one optimizer step per rollout batch: old = current)"
        reference = "pass skipped (algorithm.kl_reward_coef is 0)"
        return [
            f"old logprobs: {one if algorithm.needs_old_logprobs else old}",
            f"reference logprobs: {one if algorithm.needs_reference else reference}",
            f"critic: {self.critic.path or self.model.path}, {self.num_critic_steps} optimizer steps",
        ]

    @rule
    def _critic_steps(self) -> Problems:
        critic, steps, last = self.critic, self.num_critic_steps, self.training.num_steps
        if (warmup := critic.warmup_steps) >= last:
            reason = f"leaves the policy none of the run's {last} steps (got {warmup})"
            yield "critic.warmup_steps", reason, "training.num_steps"
        if critic.optimizer is not None and (warmup := critic.optimizer.lr_warmup_steps) > steps:
            reason = f"longer than the critic's {steps} optimizer steps (got {warmup})"
            yield "critic.optimizer.lr_warmup_steps", reason, "training.num_steps"

    @rule
    def _truncated_sampling(self) -> Problems:
        asked = self.algorithm.needs_old_logprobs
        why = (
            "logprobs are taken over the tokens that the sampling policy could draw, which its weights tell"
            " only before the first of several optimizer steps, and the reference's never"
        )
        related = "algorithm.num_epochs_per_batch", "algorithm.kl_reward_coef"
        if asked:
            yield from self.unused("rollout.top_p rollout.top_k", why, *related)
