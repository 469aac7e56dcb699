"""Rules about evaluations (see :mod:`megarl.config.validate`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.schema import EvalConfig, EvaluationSizeConfig, OnlineConfig, ReasoningGymSource
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _when(config: OnlineConfig) -> Violations:
    evaluation = config.evaluation
    asked = [name for name in ("interval", "at_start", "at_end") if getattr(evaluation, name)]
    if asked and config.data.held_out is None:
        yield Violation(
            ("data", "held_out"),
            f"missing, but evaluation asks for it by {', '.join(f'evaluation.{name}' for name in asked)}",
            tuple(("evaluation", name) for name in asked),
        )


def _size(config: OnlineConfig | EvalConfig) -> Violations:
    evaluation, held_out = config.evaluation, config.data.held_out
    if isinstance(config, OnlineConfig) and not _ever(config):
        return
    count = evaluation.num_prompts
    if isinstance(held_out, ReasoningGymSource) and count is not None and count > held_out.size:
        yield Violation(
            ("evaluation", "num_prompts"),
            f"more than the held-out set has, data.held_out.size = {held_out.size} (got {count})",
            (("data", "held_out", "size"),),
        )


def _ever(config: OnlineConfig) -> bool:
    evaluation = config.evaluation
    return bool(evaluation.interval) or evaluation.at_start or evaluation.at_end


def _sampling(config: OnlineConfig | EvalConfig) -> Violations:
    evaluation = config.evaluation
    n = evaluation.num_samples_per_prompt
    if evaluation.temperature == 0:
        if n > 1:
            yield Violation(
                ("evaluation", "num_samples_per_prompt"),
                f"at evaluation.temperature = 0 all samples of a problem are the same (got {n})",
                (("evaluation", "temperature"),),
            )
        for name, off in (("top_p", 1.0), ("top_k", 0)):
            if (value := getattr(evaluation, name)) != off:
                yield Violation(
                    ("evaluation", name),
                    f"has no effect at evaluation.temperature = 0, which takes the likeliest (got {value})",
                    (("evaluation", "temperature"),),
                )
    for k in evaluation.k:
        if k > n:
            yield Violation(
                ("evaluation", "k"),
                f"k must be at most evaluation.num_samples_per_prompt = {n} (got {k})",
                (("evaluation", "num_samples_per_prompt"),),
            )


def _consensus(config: OnlineConfig | EvalConfig) -> Violations:
    evaluation = config.evaluation
    default = EvaluationSizeConfig.model_fields["consensus_draws"].default
    if evaluation.consensus == "closed" and evaluation.consensus_draws != default:
        yield Violation(
            ("evaluation", "consensus_draws"),
            f"is only used with evaluation.consensus: sampled (got {evaluation.consensus_draws})",
            (("evaluation", "consensus"),),
        )
    if evaluation.consensus == "sampled" and not any(k > 1 for k in evaluation.k):
        yield Violation(
            ("evaluation", "consensus"),
            "needs a k above 1 in evaluation.k: cons@k is of k samples (got 'sampled')",
            (("evaluation", "k"),),
        )


EVALUATION_RULES: list[Callable[[OnlineConfig | EvalConfig], Violations]] = [_size, _sampling, _consensus]
ONLINE_EVALUATION_RULES: list[Callable[[OnlineConfig], Violations]] = [_when, *EVALUATION_RULES]
