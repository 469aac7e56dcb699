"""Settings of `megarl grpo`; docs/algorithms.md has the formulas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.dotted import is_dotted
from megarl.config.metric_names import GRPO
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Problems, Text, rule

_STEPS = "num_optimizer_steps_per_batch", "num_epochs_per_batch"


class GrpoAlgorithmConfig(OnlineAlgorithm):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) and its variants."""

    loss: Text | None = None
    """Custom policy loss, "package.module:function", instead of `objective` (guides/custom-losses.md)."""
    advantage: Text | None = None
    """Custom advantage, "package.module:function", instead of `baseline` (guides/custom-losses.md)."""
    baseline: Literal["mean", "leave_one_out", "length_weighted", "greedy", "none"] = "mean"
    """Subtracted from each reward (leave_one_out: RLOO, 2402.14740; length_weighted: OPO, 2505.23585; greedy:
    ReMax, 2310.10505, the reward of one more response per prompt, sampled at temperature 0)."""
    reward_weights: dict[Text, float] | None = None
    """Advantages of each of these rewards of info["rewards"] summed by weight (GDPO, arXiv:2601.05242)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation + 1e-6 if it is above 0 (Dr. GRPO: false)."""
    normalize_batch: bool = False
    """Then standardise advantages over all tokens of the rollout batch (Reinforce++, arXiv:2501.03262)."""
    advantage_clip: PositiveFloat | None = None
    """Clip advantages to [-c, c], last of all (null: off)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by groups of further prompts (DAPO, arXiv:2503.14476)."""
    max_generation_batches: PositiveInt = 10
    """Maximum rollout batches dynamic_sampling generates per step. If too few groups have different rewards
    by then, the run stops with an error."""
    filter_overlong: bool = False
    """Exclude responses cut at rollout.max_new_tokens from the loss (DAPO's overlong filtering)."""
    overlong_buffer: PositiveInt | None = None
    """Tokens below rollout.max_new_tokens over which a length penalty grows from 0 (DAPO's soft penalty)."""
    overlong_penalty: PositiveFloat = 1.0
    """Reward penalty of a response of rollout.max_new_tokens; needs overlong_buffer."""
    objective: Literal["clip", "cispo", "sapo", "dppo", "vespo"] = "clip"
    """clip: PPO's clipped ratio; others: CISPO, SAPO, DPPO and VESPO (docs/algorithms.md)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or per sequence (GSPO, arXiv:2507.18071)."""
    clip_low: NonNegativeFloat = 0.2
    """Lower clip: ratios below 1 - clip_low get no gradient (cispo: are raised to it; 1 switches it off)."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip: 1 + clip_high (DAPO: 0.28). dppo: both are bounds on changes of probability."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """And where it is not."""
    vespo_k_pos: NonNegativeFloat = 2.0
    """Power of the sequence's ratio w in vespo's weight w^k exp(lambda (1 - w)); advantage not negative."""
    vespo_lambda_pos: NonNegativeFloat = 3.0
    """That lambda."""
    vespo_k_neg: NonNegativeFloat = 3.0
    """The same k where the advantage is negative."""
    vespo_lambda_neg: NonNegativeFloat = 2.0
    """And lambda."""
    drift_coef: NonNegativeFloat = 0.0
    """Weight of (logprob - old logprob)^2 (Kimi K2.5, arXiv:2602.02276; prime-rl's kl_tau)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip (arXiv:1912.09729): the loss of an advantage A < 0 is at most -A c (null: off; often 3)."""
    off_policy_correction: Literal[
        "none",
        "tis",
        "icepop",
        "sequence_mask",
        "sequence_tis",
        "sequence_mask_tis",
        "sequence_icepop",
    ] = "none"
    """Correction of the mismatch between engine and trainer logprobs (docs/algorithms.md)."""
    off_policy_low: NonNegativeFloat | None = None
    """Lower bound of the ratio old / rollout probability: masks drop what is below, the others raise it."""
    off_policy_high: PositiveFloat | None = None
    """Upper bound of that ratio: masks drop what is above, tis and sequence_tis truncate it."""
    off_policy_token_high: PositiveFloat | None = None
    """Where sequence_mask_tis truncates the token's own weight (null: nowhere)."""
    off_policy_sequence_weight: Literal["geometric_mean", "product"] = "geometric_mean"
    """Ratio of a sequence in sequence_*: its tokens' geometric mean (the usual for masks) or product."""
    off_policy_denominators: Literal["all", "kept"] = "all"
    """kept: what a mask drops leaves KL, entropy and denominators too (takes a pass for old logprobs)."""
    log_ratio_clamp: PositiveFloat | None = None
    """Bound on the size of the logs of ratios and off-policy weights (null: none; verl: 20)."""
    max_logprob_error: PositiveFloat | None = None
    """Mask sequences whose mean |rollout - old logprob| exceeds this (null: off)."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Denominator of the ratio: the trainer's logprobs before the update, or the engine's at sampling."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight beta in the loss of the KL divergence from the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL (Schulman 2020; docs/algorithms.md)."""
    kl_gradient: Literal["plain", "score", "unbiased", "unbiased_old", "unbiased_rollout"] = "plain"
    """plain: the estimate's own derivative; others: the KL's in expectation (docs/algorithms.md)."""
    kl_input_clamp_value: PositiveFloat | None = None
    """Bound on the size of reference - logprob in that KL (null: none; NeMo RL and verl: 20)."""
    kl_output_clamp_value: PositiveFloat | None = None
    """Bound on the size of the estimate of a token (null: none; NeMo RL and verl: 10)."""
    kl_reward_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty in the reward (k1: old - reference logprob)."""
    kl_reward_level: Literal["token", "sequence"] = "token"
    """token: subtract from each token's reward-to-go; sequence: from the reward, before the baseline."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    positive_nll_coef: NonNegativeFloat = 0.0
    """Weight of the mean -logprob over the tokens of samples with full reward (VAPO, arXiv:2504.05118)."""
    skip_zero_advantages: Literal["auto", "off"] = "auto"
    """auto: skip samples with advantage 0 if their gradient is 0; denominators still count them."""
    loss_aggregation: Literal["token", "sequence", "fixed_length"] = "token"
    """token: sum over tokens / T; sequence: mean per sequence, sum / S; fixed_length: sum / (S L)."""
    loss_length: PositiveInt | None = None
    """L of fixed_length (Dr. GRPO, arXiv:2503.20783); null: rollout.max_new_tokens."""
    num_optimizer_steps_per_batch: PositiveInt = 1
    """Mini-batches of a rollout batch, split by group: optimizer steps per epoch."""
    num_epochs_per_batch: PositiveInt = 1
    """Epochs over the rollout batch."""

    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {
        "none": (),
        "tis": ("off_policy_low", "off_policy_high"),
        "sequence_tis": ("off_policy_low", "off_policy_high"),
        "icepop": ("off_policy_low", "off_policy_high"),
        "sequence_mask": ("off_policy_low", "off_policy_high"),
        "sequence_mask_tis": ("off_policy_low", "off_policy_high", "off_policy_token_high"),
        "sequence_icepop": ("off_policy_low", "off_policy_high"),
    }
    """Bounds that each off_policy_correction reads."""
    optional: ClassVar[tuple[tuple[str, str], ...]] = (
        ("tis", "off_policy_low"),
        ("sequence_tis", "off_policy_low"),
        ("sequence_mask_tis", "off_policy_token_high"),
    )
    """Those of them that may be null."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the loss or the reward."""
        return self.kl_coef > 0 or self.kl_reward_coef > 0

    @property
    def least_group(self) -> int:
        """Samples a group must have: 2 with a baseline of the samples, else 1."""
        return 1 if self.baseline in ("greedy", "none") or self.advantage is not None else 2

    @property
    def samples_greedily(self) -> bool:
        """Whether each group has a greedy response too."""
        return self.baseline == "greedy"

    @property
    def most_batches(self) -> int | None:
        """Maximum rollout batches per step; None without dynamic sampling."""
        return self.max_generation_batches if self.dynamic_sampling else None

    @property
    def corrects_staleness(self) -> bool:
        """Whether the loss accounts for staleness: off-policy correction, engine ratios or a custom loss."""
        return self.loss is not None or self.off_policy_correction != "none" or self.old_logprobs == "rollout"

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether old logprobs need a separate forward pass.

        With one optimizer step per batch they equal the current logprobs, detached: only settings that need
        them before the step require a pass. The engine's are known from sampling.
        """
        if self.old_logprobs == "rollout":
            return False
        asked = self.kl_reward_coef > 0 or self.max_logprob_error is not None
        return asked or self.off_policy_denominators == "kept" or self.optimizer_steps_per_batch > 1

    @property
    def old_logprobs_from(self) -> bool | Literal["rollout"]:
        """Source: the engine ("rollout"), a forward pass (True), or current logprobs, detached (False)."""
        return "rollout" if self.old_logprobs == "rollout" else self.needs_old_logprobs

    @property
    def why_no_old_pass(self) -> str:
        """Reason for the log when needs_old_logprobs is false."""
        if self.old_logprobs == "rollout":
            return "the engine's are used"
        return "one optimizer step per rollout batch: old = current"

    @property
    def has_ratios(self) -> bool:
        """Whether the ratio to the old policy can differ from 1."""
        return self.old_logprobs == "rollout" or self.optimizer_steps_per_batch > 1

    @rule
    def _custom(self) -> Problems:
        """`loss` and `advantage` have the form package.module:function. `loss` excludes `objective`,
        `ratio_level`, the clips and `off_policy_correction`; `advantage` excludes `baseline`, `normalize_std`
        and `reward_weights`."""
        for owner, replaced in (
            (
                "loss",
                "objective ratio_level clip_low clip_high dual_clip off_policy_correction",
            ),
            ("advantage", "baseline normalize_std reward_weights"),
        ):
            path = getattr(self, owner)
            if path is not None and not is_dotted(path):
                yield owner, f'must have the form "package.module:function" (got {path!r})'
            elif path is not None:
                yield from self.unused(replaced, f"has no effect: algorithm.{owner} replaces it", owner)

    @rule
    def _clip(self) -> Problems:
        """`clip_low` is below 1 (or 1 with `objective: cispo`); `dual_clip` needs `objective: clip`."""
        # CISPO as published has no lower clip: clip_low = 1 switches it off.
        objective = self.objective
        if self.clip_low != 1 or objective != "cispo":
            yield from self.lower_clip(self.clip_low)
        if self.dual_clip is not None and objective != "clip":
            reason = f"applies to algorithm.objective = clip only, not to {objective}"
            yield "dual_clip", f"{reason} (got {self.dual_clip})", "objective"

    @rule
    def _parts_of_objectives(self) -> Problems:
        """`sapo_*` and `vespo_*` need the objective of that name. `sapo` and `vespo` have no `clip_low` and
        `clip_high`, `dppo` and `vespo` no `ratio_level`, `vespo` no `off_policy_correction`."""
        objective = self.objective
        not_read = f"algorithm.objective = {objective} does not read it"
        if objective != "sapo":
            yield from self.unused("sapo_temperature_pos sapo_temperature_neg", not_read, "objective")
        if objective != "vespo":
            parts = "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
            yield from self.unused(parts, not_read, "objective")
        if objective in ("sapo", "vespo"):
            yield from self.unused("clip_low clip_high", not_read, "objective")
        if objective == "dppo":
            own = "compares tokens' probabilities and has no ratio of a sequence"
            yield from self.unused("ratio_level", f"algorithm.objective = dppo {own}", "objective")
        if objective == "vespo":
            own = "has its own ratio of a sequence"
            yield from self.unused("ratio_level", f"algorithm.objective = vespo {own}", "objective")
            engine = f"algorithm.objective = vespo {own}: old_logprobs = rollout makes it the engine's"
            yield from self.unused("off_policy_correction", engine, "objective")

    @rule
    def _ratio_of_one(self) -> Problems:
        """`objective`, `ratio_level`, `dual_clip` and `drift_coef` need several optimizer steps per rollout
        batch, or `old_logprobs: rollout`."""
        if not self.has_ratios:
            one = "with one optimizer step per rollout batch every ratio is 1"
            why = f"has no effect: {one}, unless algorithm.old_logprobs = rollout"
            ratios = "objective ratio_level dual_clip drift_coef"
            yield from self.unused(ratios, why, *_STEPS, "old_logprobs")

    @rule
    def _options_of_disabled(self) -> Problems:
        """`max_generation_batches` needs `dynamic_sampling`, `overlong_penalty` needs `overlong_buffer`,
        `kl_reward_level` needs `kl_reward_coef` > 0."""
        for owner, off, part in (
            ("dynamic_sampling", "false", "max_generation_batches"),
            ("overlong_buffer", "null", "overlong_penalty"),
            ("kl_reward_coef", "0", "kl_reward_level"),
        ):
            if not getattr(self, owner):
                yield from self.unused(part, f"has no effect: algorithm.{owner} is {off}", owner)

    @rule
    def _named_rewards(self) -> Problems:
        """`reward_weights` has a weight other than 0; it excludes `overlong_buffer`, `kl_reward_level`."""
        if self.reward_weights is None:
            return
        if not any(self.reward_weights.values()):
            yield "reward_weights", f"names no reward of a weight other than 0 (got {self.reward_weights})"
        own = "is taken off the one reward that algorithm.reward_weights does not read"
        yield from self.unused("overlong_buffer", own, "reward_weights")
        if self.kl_reward_coef > 0:
            yield from self.unused("kl_reward_level", own, "reward_weights")

    @rule
    def _loss_length(self) -> Problems:
        """`loss_length` needs `loss_aggregation: fixed_length`."""
        if (how := self.loss_aggregation) != "fixed_length":
            why = f"has no effect: algorithm.loss_aggregation is {how}, not fixed_length"
            yield from self.unused("loss_length", why, "loss_aggregation")

    @rule
    def _filtered(self) -> Problems:
        """`filter_overlong` cannot be combined with `kl_reward_level: sequence`."""
        if self.filter_overlong and self.kl_reward_coef > 0 and self.kl_reward_level == "sequence":
            why = "excluded responses have no KL, but their rewards count in the baseline"
            reason = f"cannot be combined with algorithm.kl_reward_level = sequence: {why} (got true)"
            yield "filter_overlong", reason, "kl_reward_level"

    @rule
    def _greedy_baseline(self) -> Problems:
        """`baseline: greedy` cannot be combined with `dynamic_sampling`."""
        if self.samples_greedily and self.dynamic_sampling:
            why = "groups of equal rewards, which it leaves out, differ from the greedy response"
            yield "dynamic_sampling", f"not with algorithm.baseline = greedy: {why} (got true)", "baseline"

    @rule
    def _old_of_the_engine(self) -> Problems:
        """`old_logprobs: rollout` excludes `off_policy_correction` and `max_logprob_error`."""
        if self.old_logprobs == "rollout":
            why = "compares old with rollout logprobs; algorithm.old_logprobs = rollout makes them equal"
            yield from self.unused("off_policy_correction max_logprob_error", why, "old_logprobs")

    @rule
    def _off_policy(self) -> Problems:
        """`off_policy_low` < 1 < `off_policy_high` (or = 1 where the correction truncates). Each needs an
        `off_policy_correction` that reads it; every correction needs `off_policy_high`, masks need both."""
        owner, name = "off_policy_correction", self.off_policy_correction
        read, correction = self.thresholds[name], f"algorithm.off_policy_correction = {name}"
        for threshold in ("off_policy_low", "off_policy_high", "off_policy_token_high"):
            if threshold not in read:
                yield from self.unused(threshold, f"{correction} does not read it", owner)
            elif getattr(self, threshold) is None and (name, threshold) not in self.optional:
                yield threshold, f"missing, {correction} needs it", owner
        low, high = self.off_policy_low, self.off_policy_high
        agree = "or tokens with a ratio of 1 are"
        truncates = name in ("tis", "sequence_tis")
        if low is not None and high is not None and read and not low < 1 < high:
            if not (truncates and low <= 1 <= high):
                order, what = ("<=", "truncated") if truncates else ("<", "masked")
                must = f"off_policy_low {order} 1 {order} off_policy_high must hold"
                yield "off_policy_low", f"{must}, {agree} {what} (got {low} and {high})", "off_policy_high"
        elif truncates and high is not None and high < 1:
            yield "off_policy_high", f"must be at least 1, {agree} truncated (got {high})"
        if name == "sequence_mask_tis" and (most := self.off_policy_token_high) is not None and most < 1:
            yield "off_policy_token_high", f"must be at least 1, {agree} truncated (got {most})"

    @rule
    def _parts_of_corrections(self) -> Problems:
        """`off_policy_sequence_weight` needs a correction sequence_*, `off_policy_denominators` one that
        masks; `log_ratio_clamp` needs ratios other than 1."""
        owner, name = "off_policy_correction", self.off_policy_correction
        if not name.startswith("sequence"):
            not_read = f"algorithm.{owner} = {name} does not read it"
            yield from self.unused("off_policy_sequence_weight", not_read, owner)
        if name in ("none", "tis", "sequence_tis"):
            drops_nothing = f"has no effect: algorithm.{owner} = {name} drops nothing"
            yield from self.unused("off_policy_denominators", drops_nothing, owner)
        of_ratio = self.kl_gradient in ("unbiased_old", "unbiased_rollout")
        if not (self.has_ratios or name != "none" or of_ratio):
            none = "every ratio is 1 with one optimizer step per rollout batch and no off-policy correction"
            yield from self.unused("log_ratio_clamp", f"has no effect: {none}", *_STEPS, owner)

    @rule
    def _kl(self) -> Problems:
        """`kl_estimator`, `kl_gradient` and the KL clamps need `kl_coef` > 0; `kl_estimator: k1` cannot be
        combined with `kl_gradient: plain`."""
        if self.kl_coef == 0:
            why = "has no effect: algorithm.kl_coef is 0"
            parts = "kl_estimator kl_gradient kl_input_clamp_value kl_output_clamp_value"
            yield from self.unused(parts, why, "kl_coef")
        elif self.kl_estimator == "k1" and self.kl_gradient == "plain":
            plain = "the plain gradient of k1 does not depend on the reference and averages to zero"
            use = "it does not regularise; use another, or kl_estimator k2 or k3 (got plain)"
            yield "kl_gradient", f"{plain}: {use}", "kl_estimator"


class GrpoConfig(OnlineConfig):
    """Root of `megarl grpo`."""

    algorithm: GrpoAlgorithmConfig = GrpoAlgorithmConfig()

    metric_names: ClassVar[frozenset[str]] = GRPO

    @property
    def logs_others(self) -> bool:
        """Whether code of the user's own may log metrics of other names."""
        return self.algorithm.loss is not None

    @property
    def why_zero_advantages_train(self) -> str:
        """Reason for the log why samples with advantage 0 are computed; "" if they are skipped.

        Their policy loss and its gradient are 0 for any ratio. The settings named here add another loss
        term, or need a forward pass over all samples before the advantages.
        """
        algorithm, router = self.algorithm, self.router
        if algorithm.skip_zero_advantages == "off":
            return "algorithm.skip_zero_advantages is off"
        terms = "loss kl_coef kl_reward_coef entropy_coef positive_nll_coef drift_coef max_logprob_error"
        for name in terms.split():
            if getattr(algorithm, name):
                return f"algorithm.{name} needs them"
        if algorithm.off_policy_denominators == "kept":
            return "algorithm.off_policy_denominators is kept"
        for name in ("aux_loss_coef", "bias_update_rate"):
            if getattr(router, name) != 0:  # null: the value of config.json, which is above 0
                return f"router.{name} needs them"
        return ""

    def describe_algorithm(self) -> list[str]:
        """Return the lines on forward passes that run or are skipped."""
        algorithm, why = self.algorithm, self.why_zero_advantages_train
        one = "one forward pass per rollout batch"
        old = one if algorithm.needs_old_logprobs else f"pass skipped ({algorithm.why_no_old_pass})"
        reference = one if algorithm.needs_reference else "pass skipped (algorithm.kl_coef is 0)"
        return [
            f"old logprobs: {old}",
            f"reference logprobs: {reference}",
            f"samples with advantage 0: {f'computed ({why})' if why else 'skipped'}",
        ]

    @rule
    def _group_size(self) -> Problems:
        """`baseline`, `normalize_std` and `dynamic_sampling` need several samples per prompt."""
        algorithm, size, against = self.algorithm, self.rollout.num_generations_per_prompt, {}
        if algorithm.advantage is not None:
            pass  # the function checks the group size
        elif algorithm.baseline not in ("greedy", "none"):
            alone = "with one, the baseline is the sample itself and the advantage 0"
            against["baseline"] = f"a group needs at least 2 samples: {alone}"
        elif algorithm.normalize_std:
            divide = "has no standard deviation, which algorithm.normalize_std divides by"
            against["normalize_std"] = f"a group of one {divide}"
        if algorithm.dynamic_sampling:
            wants = "algorithm.dynamic_sampling needs groups with different rewards"
            against["dynamic_sampling"] = f"{wants}, so at least 2 samples"
        for name, reason in against.items() if size < 2 else ():
            yield "rollout.num_generations_per_prompt", f"{reason} (got {size})", f"algorithm.{name}"

    @rule
    def _overlong_buffer(self) -> Problems:
        """`algorithm.overlong_buffer` must not exceed `rollout.max_new_tokens`."""
        buffer, longest = self.algorithm.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > longest:
            reason = f"must not exceed rollout.max_new_tokens = {longest} (got {buffer})"
            yield "algorithm.overlong_buffer", reason, "rollout.max_new_tokens"

    @rule
    def _truncated_sampling(self) -> Problems:
        """`rollout.top_p` and `top_k` need one optimizer step per rollout batch, `algorithm.kl_coef: 0`,
        `kl_reward_coef: 0` and no `max_logprob_error`."""
        # The support is a set of tokens per position. The trainer recomputes it from the weights that
        # sampled, which it has only before the first optimizer step on a batch.
        algorithm, steps = self.algorithm, self.algorithm.optimizer_steps_per_batch
        against: list[tuple[str, tuple[str, ...]]] = []
        if steps > 1:
            reason = (
                "logprobs are normalised over the sampling policy's support, which is known only until the"
                f" weights change: needs one optimizer step per rollout batch, not {steps}"
            )
            against.append((reason, _STEPS))
        if algorithm.kl_coef > 0:
            reason = (
                "the reference does not know the sampling policy's support, so its logprobs are not"
                f" comparable: needs algorithm.kl_coef = 0, not {algorithm.kl_coef}"
            )
            against.append((reason, ("kl_coef",)))
        for name, _ in algorithm.changed("kl_reward_coef", "max_logprob_error"):
            what = "uses logprobs over the full vocabulary; the engine's are over a part of it"
            against.append((f"algorithm.{name} {what}", (name,)))
        for reason, fields in against:
            related = (f"algorithm.{field}" for field in fields)
            yield from self.unused("rollout.top_p rollout.top_k", reason, *related)

    @rule
    def _curriculum(self) -> Problems:
        """A `curriculum` cannot be combined with `algorithm.dynamic_sampling`."""
        for at in self.data.curricula("train") if self.algorithm.dynamic_sampling else ():
            owner = "algorithm.dynamic_sampling"
            reason = f"needs the accuracy over all samples, but {owner} replaces groups that are all correct"
            yield f"data.{at}", reason, owner

    @rule
    def _asynchronous(self) -> Problems:
        """`rollout.max_staleness` excludes `top_p`, `top_k`, `router_replay`, `algorithm.dynamic_sampling`, a
        `curriculum` and `weights.offload`."""
        older = "older versions are not kept"
        gone = f" makes the trainer's logprobs depend on the weights that sampled; {older}"
        against = [(name, gone) for name, _ in self.changed("rollout.top_p", "rollout.top_k")]
        if self.rollout.router_replay:
            reason = ": a weight sync in flight reroutes earlier tokens"
            against.append(("rollout.router_replay", reason))
        if self.algorithm.dynamic_sampling:
            reason = " chooses a step's prompts after the rollout of the step before"
            against.append(("algorithm.dynamic_sampling", reason))
        for at in self.data.curricula("train"):
            reason = " chooses a step's problems from the results of the step before, which are not ready"
            against.append((f"data.{at}", reason))
        if self.weights.offload:
            against.append(("weights.offload", " needs engine and trainer to take turns; here both run"))
        staleness = self.rollout.max_staleness
        for name, reason in against if staleness else ():
            yield "rollout.max_staleness", f"{name}{reason} (got {staleness})", name
