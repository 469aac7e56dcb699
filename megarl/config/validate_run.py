"""Rules about saving, watching and starting a run, whatever it trains.

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import TrainingConfig, profiled_steps
from megarl.config.run import ProfileConfig
from megarl.config.schema import OnlineConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _best_checkpoint(config: TrainingConfig) -> Violations:
    checkpoint = config.checkpoint
    metric = checkpoint.keep_best_metric
    if metric is None:
        if checkpoint.keep_best_mode != "max":
            yield Violation(
                ("checkpoint", "keep_best_mode"),
                "has nothing to compare: checkpoint.keep_best_metric is not set (got 'min')",
                (("checkpoint", "keep_best_metric"),),
            )
        return
    held_out = config.data.held_out
    evaluated = metric == "accuracy" if isinstance(config, OnlineConfig) else metric.startswith("validation_")
    if evaluated and held_out is None:
        yield Violation(
            ("checkpoint", "keep_best_metric"),
            f"{metric} is measured on data.held_out, which is not set",
            (("data", "held_out"),),
        )


def _profile(config: TrainingConfig) -> Violations:
    profile, last = config.profile, config.training.num_steps
    try:
        steps = profiled_steps(profile)
    except (TypeError, ValueError):  # the schema has refused it
        return
    field = ("profile", "steps")
    for item in profile.steps:
        if isinstance(item, str) and not profiled_steps(ProfileConfig(steps=[item])):
            yield Violation(field, f"a range goes from its smaller to its larger step (got {item!r})", ())
    late = sorted(step for step in steps if step > last)
    if late:
        reason = f"the run ends with step {last} (got {', '.join(map(str, late[:5]))})"
        yield Violation(field, reason, (("training", "num_steps"),))
    absent = [rank for rank in profile.ranks if rank >= config.parallel.num_processes]
    if steps and absent:
        yield Violation(
            ("profile", "ranks"),
            f"there are ranks 0 to {config.parallel.num_processes - 1} (got {', '.join(map(str, absent))})",
            (("parallel", "num_processes"),),
        )


RUN_RULES: list[Callable[[TrainingConfig], Violations]] = [_best_checkpoint, _profile]
