"""Settings of the algorithms; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class GrpoAlgorithmConfig(Section):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) and its usual variations."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    """Group baseline subtracted from each reward (leave_one_out: RLOO, arXiv:2402.14740)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation + 1e-6 where it is above 0 (Dr. GRPO: false)."""
    normalize_batch: bool = False
    """Then standardise them over all tokens of the rollout batch (Reinforce++, arXiv:2501.03262)."""
    advantage_clip: PositiveFloat | None = None
    """Bound on the size of an advantage, applied last (null: none)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by fresh prompts' (DAPO, arXiv:2503.14476)."""
    max_generation_batches: PositiveInt = 10
    """Batches dynamic_sampling may draw for one step; the run ends with an error when they do not do."""
    filter_overlong: bool = False
    """Leave responses cut at rollout.max_new_tokens out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: PositiveInt | None = None
    """Tokens before rollout.max_new_tokens over which a penalty grows from 0 (DAPO's soft overlong one)."""
    overlong_penalty: PositiveFloat = 1.0
    """What that penalty takes off the reward at rollout.max_new_tokens."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip: PPO's clipped ratio; cispo: a clipped, detached ratio times the logprob (arXiv:2506.13585)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO, arXiv:2507.18071)."""
    clip_ratio_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_ratio_low get no gradient (cispo: are raised to it; 1: no clip)."""
    clip_ratio_high: NonNegativeFloat = 0.2
    """Upper clip (DAPO's clip-higher, arXiv:2503.14476, is 0.28)."""
    clip_ratio_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clip (arXiv:1912.09729): the loss of an advantage A < 0 is at most -A c (null: off; often 3)."""
    off_policy_correction: Literal["none", "tis", "icepop", "sequence_mask", "sequence_tis"] = "none"
    """Weight for tokens the engine drew with other logprobs than the trainer's (docs/algorithms.md)."""
    off_policy_low: NonNegativeFloat | None = None
    """Least old / rollout probability ratio that is kept (icepop, sequence_mask)."""
    off_policy_high: PositiveFloat | None = None
    """Greatest such ratio: where tis and sequence_tis truncate it, and the two masks drop tokens."""
    max_logprob_error: PositiveFloat | None = None
    """Drop sequences whose mean |rollout - old logprob| is above it from the loss (null: none)."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """What ratios are relative to: the trainer's logprobs before the update, or the engine's at sampling."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight beta of the KL to the reference in the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL (Schulman 2020; docs/algorithms.md)."""
    kl_gradient: Literal["plain", "score"] = "plain"
    """plain: the estimate's own derivative; score: logprob - reference, that of the KL in expectation."""
    kl_reward_coef: NonNegativeFloat = 0.0
    """Weight of the KL (k1: old - reference logprob) taken off the reward."""
    kl_reward_level: Literal["token", "sequence"] = "token"
    """token: off each token's reward-to-go; sequence: off the sequence's reward, before the baseline."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    positive_nll_coef: NonNegativeFloat = 0.0
    """Weight of -logprob, a mean over the tokens of samples with full marks (VAPO, arXiv:2504.05118)."""
    skip_zero_advantages: Literal["auto", "off"] = "auto"
    """auto: samples with advantage 0 count in the loss but are not computed, where their gradient is 0."""
    loss_aggregation: Literal["token", "sequence", "fixed_length"] = "token"
    """token: sum over tokens / T; sequence: mean over each sequence's, then / S; fixed_length: / (S L)."""
    loss_length: PositiveInt | None = None
    """That length L (Dr. GRPO, arXiv:2503.20783); null is rollout.max_new_tokens."""
    num_optimizer_steps_per_batch: PositiveInt = 1
    """Optimizer steps per rollout batch, each on its own share of the prompts' groups."""
    num_epochs_per_batch: PositiveInt = 1
    """Passes over the rollout batch."""
