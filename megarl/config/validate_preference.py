"""Rules about training on pairs: no option may vanish without a word.

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import data_parallel_size, uses_reference
from megarl.config.preference import DpoConfig, PreferenceReasoningGymSource, RmConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]

# Which of the options that not every loss has each of them reads.
_READ = {
    "dpo": ("label_smoothing", "length_normalization"),
    "ipo": ("length_normalization",),
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("label_smoothing", "simpo_gamma"),
    "orpo": (),
}


def _options(config: DpoConfig) -> Violations:
    algorithm = config.algorithm
    for name in dict.fromkeys(name for names in _READ.values() for name in names):
        value = getattr(algorithm, name)
        if name in _READ[algorithm.loss] or value is None or (name == "label_smoothing" and value == 0):
            continue
        always = name == "length_normalization" and algorithm.loss in ("simpo", "orpo")
        yield Violation(
            ("algorithm", name),
            f"algorithm.loss = {algorithm.loss} "
            + ("always divides by the response's tokens" if always else "does not read it")
            + f" (got {str(value).lower()})",
            (("algorithm", "loss"),),
        )


def _reference(config: DpoConfig) -> Violations:
    if uses_reference(config.algorithm):
        return
    for name in ("path", "cache_dir"):
        value = getattr(config.reference, name)
        if value is not None:
            yield Violation(
                ("reference", name),
                f"algorithm.loss = {config.algorithm.loss} needs no reference (got {value!r})",
                (("algorithm", "loss"),),
            )


def _templates(config: DpoConfig | RmConfig) -> Violations:
    for split in ("train", "held_out"):
        source = getattr(config.data, split)
        if not isinstance(source, PreferenceReasoningGymSource):
            continue
        for name, fields in (
            ("chosen_templates", ("{answer}",)),
            ("rejected_templates", ("{answer}", "{other_answer}")),
        ):
            for template in getattr(source, name):
                if not any(field in template for field in fields):
                    yield Violation(
                        ("data", split, name), f"each form needs {' or '.join(fields)} (got {template!r})"
                    )


def _pair_fits(config: DpoConfig | RmConfig) -> Violations:
    longest, budget = config.packing.max_sequence_length, config.packing.max_tokens_per_microbatch
    if longest is not None and longest <= budget < 2 * longest:
        yield Violation(
            ("packing", "max_sequence_length"),
            "both responses of a pair share a microbatch: at most half of"
            f" packing.max_tokens_per_microbatch = {budget} (got {longest})",
            (("packing", "max_tokens_per_microbatch"),),
        )


def _batch(config: DpoConfig | RmConfig) -> Violations:
    train, batch_size = config.data.train, config.training.batch_size
    if isinstance(train, PreferenceReasoningGymSource) and batch_size > train.size:
        yield Violation(
            ("training", "batch_size"),
            f"larger than the training set, data.train.size = {train.size} (got {batch_size})",
            (("data", "train", "size"),),
        )
    ranks = data_parallel_size(config.parallel)
    if batch_size < ranks:
        yield Violation(
            ("training", "batch_size"),
            f"a step of {batch_size} pairs leaves some of {ranks} data-parallel ranks empty",
            (("parallel", "num_processes"),),
        )


def _validation(config: DpoConfig | RmConfig) -> Violations:
    training, held_out = config.training, config.data.held_out
    if training.validation_interval and held_out is None:
        yield Violation(
            ("training", "validation_interval"),
            f"needs data.held_out, which is not set (got {training.validation_interval})",
            (("data", "held_out"),),
        )
    if isinstance(held_out, PreferenceReasoningGymSource) and training.validation_size > held_out.size:
        yield Violation(
            ("training", "validation_size"),
            f"larger than the held-out set, data.held_out.size = {held_out.size}"
            f" (got {training.validation_size})",
            (("data", "held_out", "size"),),
        )


_PAIR_RULES: list[Callable[[DpoConfig | RmConfig], Violations]] = [
    _templates,
    _pair_fits,
    _batch,
    _validation,
]
DPO_RULES: list[Callable[[DpoConfig], Violations]] = [_options, _reference, *_PAIR_RULES]
RM_RULES: list[Callable[[RmConfig], Violations]] = [*_PAIR_RULES]
