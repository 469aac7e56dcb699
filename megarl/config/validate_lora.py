"""Rules about low-rank adapters that need no look at the model (megarl/models/lora.py has the others).

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.derived import TrainingConfig
from megarl.config.lora import ALL_LINEAR
from megarl.config.preference import RmConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def _reward_model(config: TrainingConfig) -> Violations:
    if isinstance(config, RmConfig) and config.lora is not None:
        yield Violation(("lora",), "not for reward models: their new head is trained with all weights")


def _targets(config: TrainingConfig) -> Violations:
    if config.lora is None:
        return
    names = config.lora.target_modules
    if ALL_LINEAR in names and len(names) > 1:
        yield Violation(("lora", "target_modules"), f"{ALL_LINEAR} stands alone (got {', '.join(names)})")
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield Violation(("lora", "target_modules"), f"{name} is named twice")


def _frozen_router(config: TrainingConfig) -> Violations:
    if config.lora is not None and config.router.bias_update_rate:
        yield Violation(
            ("router", "bias_update_rate"),
            "not with lora, which leaves the model's own weights as they are"
            f" (got {config.router.bias_update_rate})",
            (("lora",),),
        )


LORA_RULES: list[Callable[[TrainingConfig], Violations]] = [_reward_model, _targets, _frozen_router]
