"""Rules about the policy loss and what it needs: no option may vanish without a word.

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import optimizer_steps_per_batch
from megarl.config.schema import GrpoConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


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


ALGORITHM_RULES: list[Callable[[GrpoConfig], Violations]] = [_clip, _off_policy, _kl, _truncated_sampling]
