"""Megatron's AdamW and learning-rate schedule from MegaRL's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config.schema import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, chunks: list[Any], dtype: torch.dtype, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer over DDP-wrapped model chunks and its schedule over ``total_steps`` optimizer steps."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            # Without clipping Megatron does not compute the norm at all; an infinite bound logs it.
            clip_grad=config.max_grad_norm or float("inf"),
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=config.distributed,
        ),
        chunks,
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(total_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule
