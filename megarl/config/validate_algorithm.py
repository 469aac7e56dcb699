"""Rules about the policy loss and what it needs: no option may vanish without a word.

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import has_ratios, optimizer_steps_per_batch
from megarl.config.schema import GrpoConfig
from megarl.config.validate_data import curricula_of
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _group_size(config: GrpoConfig) -> Violations:
    algorithm, size = config.algorithm, config.rollout.num_generations_per_prompt
    if size >= 2:
        return
    path = ("rollout", "num_generations_per_prompt")
    if algorithm.baseline != "none":
        yield Violation(
            path,
            "a group needs at least 2 samples: alone, a sample has no baseline and its advantage is always 0"
            f" (got {size})",
            (("algorithm", "baseline"),),
        )
    elif algorithm.normalize_std:
        yield Violation(
            path,
            f"a group of one has no standard deviation for algorithm.normalize_std to divide by (got {size})",
            (("algorithm", "normalize_std"),),
        )
    if algorithm.dynamic_sampling:
        yield Violation(
            path,
            f"algorithm.dynamic_sampling wants groups with unequal rewards, one sample has none (got {size})",
            (("algorithm", "dynamic_sampling"),),
        )


def _clip(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    # CISPO as published has no lower bound; saying so takes the value 1, and nothing above it.
    if algorithm.clip_ratio_low > 1 or (algorithm.clip_ratio_low == 1 and algorithm.objective != "cispo"):
        yield Violation(
            ("algorithm", "clip_ratio_low"),
            "must be below 1: ratios are positive, so 1 - clip_ratio_low <= 0 never clips"
            f" (got {algorithm.clip_ratio_low})",
        )
    if algorithm.clip_ratio_c is not None and algorithm.objective == "cispo":
        yield Violation(
            ("algorithm", "clip_ratio_c"),
            "dual clip bounds the clipped objective; algorithm.objective = cispo has no place for it"
            f" (got {algorithm.clip_ratio_c})",
            (("algorithm", "objective"),),
        )


def _ratio_of_one(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    if has_ratios(algorithm):
        return
    for name, default in (("objective", "clip"), ("ratio_level", "token"), ("clip_ratio_c", None)):
        value = getattr(algorithm, name)
        if value != default:
            yield Violation(
                ("algorithm", name),
                "has no effect: with one optimizer step per rollout batch every ratio is 1, unless"
                f" algorithm.old_logprobs = rollout (got {value})",
                (
                    ("algorithm", "num_optimizer_steps_per_batch"),
                    ("algorithm", "num_epochs_per_batch"),
                    ("algorithm", "old_logprobs"),
                ),
            )


# Field -> its default, the field it belongs to, and how that is written where it is off.
_PARTS = {
    "max_generation_batches": (10, "dynamic_sampling", "false"),
    "overlong_penalty": (1.0, "overlong_buffer", "null"),
    "kl_reward_level": ("token", "kl_reward_coef", "0"),
}


def _parts_of_nothing(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    for name, (default, owner, off) in _PARTS.items():
        value = getattr(algorithm, name)
        if value != default and not getattr(algorithm, owner):
            yield Violation(
                ("algorithm", name),
                f"has no effect: algorithm.{owner} is {off} (got {value})",
                (("algorithm", owner),),
            )


def _lengths(config: GrpoConfig) -> Violations:
    algorithm, longest = config.algorithm, config.rollout.max_new_tokens
    if algorithm.loss_length is not None and algorithm.loss_aggregation != "fixed_length":
        yield Violation(
            ("algorithm", "loss_length"),
            f"has no effect: algorithm.loss_aggregation is {algorithm.loss_aggregation}, not fixed_length"
            f" (got {algorithm.loss_length})",
            (("algorithm", "loss_aggregation"),),
        )
    if algorithm.overlong_buffer is not None and algorithm.overlong_buffer > longest:
        yield Violation(
            ("algorithm", "overlong_buffer"),
            f"must not exceed rollout.max_new_tokens = {longest} (got {algorithm.overlong_buffer})",
            (("rollout", "max_new_tokens"),),
        )


def _filtered(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    if algorithm.filter_overlong and algorithm.kl_reward_coef > 0 and algorithm.kl_reward_level == "sequence":
        yield Violation(
            ("algorithm", "filter_overlong"),
            "responses that are left out have no KL for algorithm.kl_reward_level = sequence to take off"
            " their reward, and their group's baseline counts it (got true)",
            (("algorithm", "kl_reward_level"),),
        )


def _old_of_the_engine(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    if algorithm.old_logprobs != "rollout":
        return
    for name, default in (("off_policy_correction", "none"), ("max_logprob_error", None)):
        value = getattr(algorithm, name)
        if value != default:
            yield Violation(
                ("algorithm", name),
                "compares old with rollout logprobs, which algorithm.old_logprobs = rollout makes the same"
                f" (got {value})",
                (("algorithm", "old_logprobs"),),
            )


# Which thresholds each correction reads.
_THRESHOLDS = {
    "none": (),
    "tis": ("off_policy_high",),
    "sequence_tis": ("off_policy_high",),
    "icepop": ("off_policy_low", "off_policy_high"),
    "sequence_mask": ("off_policy_low", "off_policy_high"),
}


def _off_policy(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    correction, read = algorithm.off_policy_correction, _THRESHOLDS[algorithm.off_policy_correction]
    for name in ("off_policy_low", "off_policy_high"):
        value = getattr(algorithm, name)
        if value is not None and name not in read:
            yield Violation(
                ("algorithm", name),
                f"algorithm.off_policy_correction = {correction} does not read it (got {value})",
                (("algorithm", "off_policy_correction"),),
            )
        elif value is None and name in read:
            yield Violation(
                ("algorithm", name),
                f"missing, algorithm.off_policy_correction = {correction} needs it",
                (("algorithm", "off_policy_correction"),),
            )
    low, high = algorithm.off_policy_low, algorithm.off_policy_high
    if len(read) == 2 and low is not None and high is not None and not low < 1 < high:
        yield Violation(
            ("algorithm", "off_policy_low"),
            "off_policy_low < 1 < off_policy_high must hold, or tokens on which engine and trainer agree are"
            f" dropped (got {low} and {high})",
            (("algorithm", "off_policy_high"),),
        )
    if len(read) == 1 and high is not None and high < 1:
        yield Violation(
            ("algorithm", "off_policy_high"),
            f"must be at least 1, or tokens on which engine and trainer agree are truncated (got {high})",
        )


def _kl(config: GrpoConfig) -> Violations:
    algorithm = config.algorithm
    if algorithm.kl_coef == 0:
        for name, default in (("kl_estimator", "k3"), ("kl_gradient", "plain")):
            value = getattr(algorithm, name)
            if value != default:
                yield Violation(
                    ("algorithm", name),
                    f"has no effect: algorithm.kl_coef is 0 (got {value})",
                    (("algorithm", "kl_coef"),),
                )
    elif algorithm.kl_estimator == "k1" and algorithm.kl_gradient == "plain":
        yield Violation(
            ("algorithm", "kl_gradient"),
            "the plain gradient of k1 is 1 whatever the reference says, and 0 in expectation: the KL would"
            " not hold the policy back; use score, or kl_estimator k2 or k3 (got plain)",
            (("algorithm", "kl_estimator"),),
        )


def _truncated_sampling(config: GrpoConfig) -> Violations:
    rollout, algorithm = config.rollout, config.algorithm
    asked = [name for name, off in (("top_p", 1.0), ("top_k", 0)) if getattr(rollout, name) != off]
    # The support is a set of tokens per position; the trainer has it from the weights that sampled, and
    # those are at hand only before the first optimizer step on a batch.
    for name in asked:
        value = getattr(rollout, name)
        if optimizer_steps_per_batch(algorithm) > 1:
            yield Violation(
                ("rollout", name),
                "logprobs are taken over the tokens that the sampling policy could draw, which the weights"
                " tell only until they change: needs one optimizer step per rollout batch, not"
                f" {optimizer_steps_per_batch(algorithm)} (got {value})",
                (("algorithm", "num_optimizer_steps_per_batch"), ("algorithm", "num_epochs_per_batch")),
            )
        if algorithm.kl_coef > 0:
            yield Violation(
                ("rollout", name),
                "the reference does not know which tokens the sampling policy could draw, so its logprobs"
                " would mean something else: needs algorithm.kl_coef = 0, not"
                f" {algorithm.kl_coef} (got {value})",
                (("algorithm", "kl_coef"),),
            )
        for other in ("kl_reward_coef", "max_logprob_error"):
            if getattr(algorithm, other):
                yield Violation(
                    ("rollout", name),
                    f"algorithm.{other} takes a pass for logprobs over the whole vocabulary, the engine's are"
                    f" of a part of it (got {value})",
                    (("algorithm", other),),
                )


def _curriculum(config: GrpoConfig) -> Violations:
    if config.algorithm.dynamic_sampling:
        for path in curricula_of(config, "train"):
            yield Violation(
                path,
                "goes by the accuracy over all samples, and algorithm.dynamic_sampling replaces groups that"
                " are all right",
                (("algorithm", "dynamic_sampling"),),
            )


def _asynchronous(config: GrpoConfig) -> Violations:
    if config.rollout.max_staleness == 0:
        return
    path = ("rollout", "max_staleness")
    got = f"(got {config.rollout.max_staleness})"
    for name, off in (("top_p", 1.0), ("top_k", 0)):
        if getattr(config.rollout, name) != off:
            yield Violation(
                path,
                f"rollout.{name} makes the trainer's logprobs depend on which weights sampled, and those of"
                f" older versions are gone {got}",
                (("rollout", name),),
            )
    if config.rollout.router_replay:
        yield Violation(
            path,
            f"rollout.router_replay: a change of weights chooses the experts of earlier tokens anew {got}",
            (("rollout", "router_replay"),),
        )
    if config.algorithm.dynamic_sampling:
        yield Violation(
            path,
            "algorithm.dynamic_sampling decides after a step's rollout which prompts the next one begins with"
            f" {got}",
            (("algorithm", "dynamic_sampling"),),
        )
    for curriculum in curricula_of(config, "train"):
        yield Violation(
            path,
            f"{'.'.join(curriculum)} makes a step's problems by what came of the step before, which is not"
            f" there yet {got}",
            (curriculum,),
        )
    if config.weights.offload:
        yield Violation(
            path,
            f"weights.offload lets engine and trainer sleep in turns; here both work {got}",
            (("weights", "offload"),),
        )


ALGORITHM_RULES: list[Callable[[GrpoConfig], Violations]] = [
    _group_size,
    _clip,
    _ratio_of_one,
    _parts_of_nothing,
    _lengths,
    _filtered,
    _old_of_the_engine,
    _off_policy,
    _kl,
    _truncated_sampling,
    _curriculum,
    _asynchronous,
]
