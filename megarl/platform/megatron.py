"""Adapt megatron-core on every platform without Transformer Engine and Apex.

Their absence is supported, on GPUs and CPUs. megatron-core's files are not changed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

_ANNOUNCED = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "transformer.transformer_layer": "Rewrapping ModuleSpec",
    "distributed.distributed_data_parallel": "full_param_layout not provided",
    "dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""Deprecation notices of 0.19 at every start, by module; docs/architecture.md says why GPTModel stays."""


def install() -> None:
    """Fix megatron-core's errors without these packages; imports it. Called once."""
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.transformer.moe.moe_utils as moe_utils

    for module, message in _ANNOUNCED.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(_without(message))
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 reads it without defining it
        moe_utils.te_general_gemm = None
    if not distributed.HAVE_APEX_OR_TE:  # then torch's Adam is used
        optimizer = distributed.DistributedOptimizer
        optimizer._set_main_param_and_optimizer_states = _with_own_step(
            optimizer._set_main_param_and_optimizer_states
        )


def _without(message: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: message not in record.getMessage()


def _with_own_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """Fix the step count of torch's AdamW, which keeps one in every parameter's state.

    A checkpoint has the count once: the original does not find it among a parameter's tensors, and gives all
    parameters one shared tensor, so each step would count once per parameter.
    """

    @functools.wraps(set_states)
    def set_with_step(optimizer: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(optimizer, model_param, tensors | {"step": state["step"]})

    return set_with_step
