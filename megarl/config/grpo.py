"""Settings of `megarl grpo`; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.dotted import is_dotted
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Problems, Text, rule

_STEPS = "num_optimizer_steps_per_batch", "num_epochs_per_batch"


class GrpoAlgorithmConfig(OnlineAlgorithm):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) and its usual variations."""

    loss: Text | None = None
    """A policy term of your own, "package.module:function", in place of `objective` (custom-losses.md)."""
    advantage: Text | None = None
    """An advantage of your own, "package.module:function", in place of `baseline` (custom-losses.md)."""
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
    clip_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_low get no gradient (cispo: are raised to it; 1: no clip)."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip (DAPO's clip-higher, arXiv:2503.14476, is 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
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

    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {
        "none": (),
        "tis": ("off_policy_high",),
        "sequence_tis": ("off_policy_high",),
        "icepop": ("off_policy_low", "off_policy_high"),
        "sequence_mask": ("off_policy_low", "off_policy_high"),
    }
    """Which of them each off_policy_correction reads."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the loss or the reward."""
        return self.kl_coef > 0 or self.kl_reward_coef > 0

    @property
    def least_group(self) -> int:
        """One sample has no baseline but itself."""
        return 1 if self.baseline == "none" or self.advantage is not None else 2

    @property
    def most_batches(self) -> int | None:
        """See OnlineAlgorithm."""
        return self.max_generation_batches if self.dynamic_sampling else None

    @property
    def corrects_staleness(self) -> bool:
        """By a weight, by ratios to the engine's logprobs, or as its author sees fit."""
        return self.loss is not None or self.off_policy_correction != "none" or self.old_logprobs == "rollout"

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether old logprobs need a pass of their own.

        With one optimizer step per batch the trainer's logprobs before it are the current ones, detached: a
        pass is made only for what must know them before the step. The engine's are there already.
        """
        if self.old_logprobs == "rollout":
            return False
        asked = self.kl_reward_coef > 0 or self.max_logprob_error is not None
        return asked or self.optimizer_steps_per_batch > 1

    @property
    def old_logprobs_from(self) -> bool | Literal["rollout"]:
        """The engine's, those of a pass (true), or none (false): the loss takes the current, detached."""
        return "rollout" if self.old_logprobs == "rollout" else self.needs_old_logprobs

    @property
    def why_no_old_pass(self) -> str:
        """For a log line, where needs_old_logprobs is false."""
        if self.old_logprobs == "rollout":
            return "they are the engine's"
        return "one optimizer step per rollout batch: old = current"

    @property
    def has_ratios(self) -> bool:
        """Whether the ratio to the old policy is ever another number than 1."""
        return self.old_logprobs == "rollout" or self.optimizer_steps_per_batch > 1

    @rule
    def _own(self) -> Problems:
        for owner, replaced in (
            (
                "loss",
                "objective ratio_level clip_low clip_high dual_clip off_policy_correction",
            ),
            ("advantage", "baseline normalize_std"),
        ):
            path = getattr(self, owner)
            if path is not None and not is_dotted(path):
                yield owner, f'is written "package.module:function" (got {path!r})'
            elif path is not None:
                yield from self.unused(replaced, f"has no effect: algorithm.{owner} takes its place", owner)

    @rule
    def _clip(self) -> Problems:
        # CISPO as published has no lower bound; saying so takes the value 1, and nothing above it.
        if self.clip_low != 1 or self.objective != "cispo":
            yield from self.lower_clip(self.clip_low)
        if self.dual_clip is not None and self.objective == "cispo":
            reason = "dual clip bounds the clipped objective; algorithm.objective = cispo has no place for it"
            yield "dual_clip", f"{reason} (got {self.dual_clip})", "objective"

    @rule
    def _ratio_of_one(self) -> Problems:
        if not self.has_ratios:
            one = "with one optimizer step per rollout batch every ratio is 1"
            why = f"has no effect: {one}, unless algorithm.old_logprobs = rollout"
            yield from self.unused("objective ratio_level dual_clip", why, *_STEPS, "old_logprobs")

    @rule
    def _parts_of_nothing(self) -> Problems:
        for owner, off, part in (
            ("dynamic_sampling", "false", "max_generation_batches"),
            ("overlong_buffer", "null", "overlong_penalty"),
            ("kl_reward_coef", "0", "kl_reward_level"),
        ):
            if not getattr(self, owner):
                yield from self.unused(part, f"has no effect: algorithm.{owner} is {off}", owner)

    @rule
    def _loss_length(self) -> Problems:
        if (how := self.loss_aggregation) != "fixed_length":
            why = f"has no effect: algorithm.loss_aggregation is {how}, not fixed_length"
            yield from self.unused("loss_length", why, "loss_aggregation")

    @rule
    def _filtered(self) -> Problems:
        if self.filter_overlong and self.kl_reward_coef > 0 and self.kl_reward_level == "sequence":
            kl = "have no KL for algorithm.kl_reward_level = sequence to take off their reward"
            reason = f"responses that are left out {kl}, and their group's baseline counts it (got true)"
            yield "filter_overlong", reason, "kl_reward_level"

    @rule
    def _old_of_the_engine(self) -> Problems:
        if self.old_logprobs == "rollout":
            why = "compares old with rollout logprobs, which algorithm.old_logprobs = rollout makes the same"
            yield from self.unused("off_policy_correction max_logprob_error", why, "old_logprobs")

    @rule
    def _off_policy(self) -> Problems:
        owner, read = "off_policy_correction", self.thresholds[self.off_policy_correction]
        correction = f"algorithm.{owner} = {self.off_policy_correction}"
        for name in ("off_policy_low", "off_policy_high"):
            if name not in read:
                yield from self.unused(name, f"{correction} does not read it", owner)
            elif getattr(self, name) is None:
                yield name, f"missing, {correction} needs it", owner
        low, high = self.off_policy_low, self.off_policy_high
        agree = "or tokens on which engine and trainer agree are"
        if len(read) == 2 and low is not None and high is not None and not low < 1 < high:
            reason = f"off_policy_low < 1 < off_policy_high must hold, {agree} dropped (got {low} and {high})"
            yield "off_policy_low", reason, "off_policy_high"
        if len(read) == 1 and high is not None and high < 1:
            yield "off_policy_high", f"must be at least 1, {agree} truncated (got {high})"

    @rule
    def _kl(self) -> Problems:
        if self.kl_coef == 0:
            why = "has no effect: algorithm.kl_coef is 0"
            yield from self.unused("kl_estimator kl_gradient", why, "kl_coef")
        elif self.kl_estimator == "k1" and self.kl_gradient == "plain":
            plain = "the plain gradient of k1 is 1 whatever the reference says, and 0 in expectation"
            use = "the KL would not hold the policy back; use score, or kl_estimator k2 or k3 (got plain)"
            yield "kl_gradient", f"{plain}: {use}", "kl_estimator"


class GrpoConfig(OnlineConfig):
    """Root of `megarl grpo`."""

    algorithm: GrpoAlgorithmConfig = GrpoAlgorithmConfig()

    @property
    def why_zero_advantages_train(self) -> str:
        """For a log line, why samples whose advantage is 0 are computed all the same; "" where they are not.

        With that advantage the policy loss and its gradient are 0 whatever the ratio; these settings add a
        term that is not, or make the advantages wait for a pass over all samples.
        """
        algorithm, router = self.algorithm, self.router
        if algorithm.skip_zero_advantages == "off":
            return "algorithm.skip_zero_advantages is off"
        terms = "loss", "kl_coef", "kl_reward_coef", "entropy_coef", "positive_nll_coef", "max_logprob_error"
        for name in terms:
            if getattr(algorithm, name):
                return f"algorithm.{name} needs them"
        for name in ("aux_loss_coef", "bias_update_rate"):
            if getattr(router, name) != 0:  # null: config.json's, which is above 0
                return f"router.{name} needs them"
        return ""

    def describe_algorithm(self) -> list[str]:
        """Which passes are made and skipped."""
        algorithm, why = self.algorithm, self.why_zero_advantages_train
        one = "one forward pass per rollout batch"
        old = one if algorithm.needs_old_logprobs else f"pass skipped ({algorithm.why_no_old_pass})"
        reference = one if algorithm.needs_reference else "pass skipped (algorithm.kl_coef is 0)"
        return [
            f"old logprobs: {old}",
            f"reference logprobs: {reference}",
            f"samples whose advantage is 0: {f'trained on ({why})' if why else 'not computed'}",
        ]

    @rule
    def _group_size(self) -> Problems:
        algorithm, size, against = self.algorithm, self.rollout.num_generations_per_prompt, {}
        if algorithm.advantage is not None:
            pass  # it says itself what it needs
        elif algorithm.baseline != "none":
            alone = "alone, a sample has no baseline and its advantage is always 0"
            against["baseline"] = f"a group needs at least 2 samples: {alone}"
        elif algorithm.normalize_std:
            divide = "has no standard deviation for algorithm.normalize_std to divide by"
            against["normalize_std"] = f"a group of one {divide}"
        if algorithm.dynamic_sampling:
            wants = "algorithm.dynamic_sampling wants groups with unequal rewards"
            against["dynamic_sampling"] = f"{wants}, one sample has none"
        for name, reason in against.items() if size < 2 else ():
            yield "rollout.num_generations_per_prompt", f"{reason} (got {size})", f"algorithm.{name}"

    @rule
    def _overlong_buffer(self) -> Problems:
        buffer, longest = self.algorithm.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > longest:
            reason = f"must not exceed rollout.max_new_tokens = {longest} (got {buffer})"
            yield "algorithm.overlong_buffer", reason, "rollout.max_new_tokens"

    @rule
    def _truncated_sampling(self) -> Problems:
        # The support is a set of tokens per position; the trainer has it from the weights that sampled, and
        # those are at hand only before the first optimizer step on a batch.
        algorithm, steps = self.algorithm, self.algorithm.optimizer_steps_per_batch
        against: list[tuple[str, tuple[str, ...]]] = []
        if steps > 1:
            reason = (
                "logprobs are taken over the tokens that the sampling policy could draw, which the weights"
                f" tell only until they change: needs one optimizer step per rollout batch, not {steps}"
            )
            against.append((reason, _STEPS))
        if algorithm.kl_coef > 0:
            reason = (
                "the reference does not know which tokens the sampling policy could draw, so its logprobs"
                f" would mean something else: needs algorithm.kl_coef = 0, not {algorithm.kl_coef}"
            )
            against.append((reason, ("kl_coef",)))
        for name, _ in algorithm.changed("kl_reward_coef", "max_logprob_error"):
            what = "takes a pass for logprobs over the whole vocabulary, the engine's are of a part of it"
            against.append((f"algorithm.{name} {what}", (name,)))
        for reason, fields in against:
            related = (f"algorithm.{field}" for field in fields)
            yield from self.unused("rollout.top_p rollout.top_k", reason, *related)

    @rule
    def _curriculum(self) -> Problems:
        for at in self.data.curricula("train") if self.algorithm.dynamic_sampling else ():
            owner = "algorithm.dynamic_sampling"
            reason = f"goes by the accuracy over all samples, and {owner} replaces groups that are all right"
            yield f"data.{at}", reason, owner

    @rule
    def _asynchronous(self) -> Problems:
        older = "those of older versions are gone"
        gone = f" makes the trainer's logprobs depend on which weights sampled, and {older}"
        against = [(name, gone) for name, _ in self.changed("rollout.top_p", "rollout.top_k")]
        if self.rollout.router_replay:
            reason = ": a change of weights chooses the experts of earlier tokens anew"
            against.append(("rollout.router_replay", reason))
        if self.algorithm.dynamic_sampling:
            reason = " decides after a step's rollout which prompts the next one begins with"
            against.append(("algorithm.dynamic_sampling", reason))
        for at in self.data.curricula("train"):
            reason = " makes a step's problems by what came of the step before, which is not there yet"
            against.append((f"data.{at}", reason))
        if self.weights.offload:
            against.append(("weights.offload", " lets engine and trainer sleep in turns; here both work"))
        staleness = self.rollout.max_staleness
        for name, reason in against if staleness else ():
            yield "rollout.max_staleness", f"{name}{reason} (got {staleness})", name
