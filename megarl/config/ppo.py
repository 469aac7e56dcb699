"""Settings of `megarl ppo`: policy gradients with a critic; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.schema import OnlineConfig, OptimizerConfig
from megarl.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text

Share = Annotated[float, Field(ge=0, le=1)]


class PpoAlgorithmConfig(Section):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) on tokens."""

    gamma: Share = 1.0
    """Discount of one token."""
    gae_lambda: Share = 0.95
    """Weight of longer returns in the advantages (GAE, arXiv:1506.02438); 1: return minus value."""
    normalize_advantages: bool = True
    """Advantages of the rollout batch's tokens to mean 0 and deviation 1."""
    clip_ratio_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_ratio_low get no gradient."""
    clip_ratio_high: NonNegativeFloat = 0.2
    """Upper clip."""
    clip_ratio_c: Annotated[float, Field(gt=1)] | None = None
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


class CriticConfig(Section):
    """The model that predicts each token's return; it shares the policy's parallel layout and packing."""

    path: Text | None = None
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
