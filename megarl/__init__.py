"""MegaRL: post-training of large language models on Megatron-Core and vLLM.

From Python: ``megarl.grpo("run.yaml", reward=my_reward)``, and so on for every job (:mod:`megarl.api`).
Importing this package imports nothing heavy and patches nothing; see :mod:`megarl.platform`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Name -> module, loaded on first use; __init__.pyi has the same for type checkers.
_PUBLIC = {
    **dict.fromkeys(
        ("Result", "convert_checkpoint", "distill", "dpo", "evaluate", "grpo", "plan", "ppo"), "megarl.api"
    ),
    **dict.fromkeys(("read_result", "rm", "sft"), "megarl.api"),
    **dict.fromkeys(
        ("Environment", "Observation", "Problem", "StepResult", "Verifier"), "megarl.environments.base"
    ),
    "UserError": "megarl.errors",
    "load_config": "megarl.config.load",
}
__all__ = [
    "Environment",
    "Observation",
    "Problem",
    "Result",
    "StepResult",
    "UserError",
    "Verifier",
    "convert_checkpoint",
    "distill",
    "dpo",
    "evaluate",
    "grpo",
    "load_config",
    "plan",
    "ppo",
    "read_result",
    "rm",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megarl' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
