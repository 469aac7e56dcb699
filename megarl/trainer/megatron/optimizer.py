"""Build Megatron's AdamW and learning-rate schedule from MegaRL's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config.optimizer import OptimizerConfig
from megarl.config.parallel import ParallelConfig
from megarl.platform import spans


def wrap_chunks(chunks: list[Any], parallel: ParallelConfig, *, distributed: bool) -> list[Any]:
    """Wrap each chunk in Megatron's data parallelism: gradient buffers and their reduction."""
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=distributed,
    )
    ddp = [DistributedDataParallel(chunk.config, reduction, chunk) for chunk in chunks]
    pauses = [chunk.no_sync for chunk in ddp]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = _finalize_without_scaling
        if parallel.overlap_grad_reduce:  # not before the last microbatch
            chunk.config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return ddp


def _finalize_without_scaling(model: list[Any], num_tokens: torch.Tensor | None, **kwargs: Any) -> None:
    """Run Megatron's gradient reduction without dividing by tokens, which the loss weights have done."""
    with spans.span(spans.REDUCTION):
        finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    config: OptimizerConfig, chunks: list[Any], dtype: torch.dtype, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimizer of DDP-wrapped model chunks and its schedule over ``total_steps`` steps."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            # Without clipping Megatron does not compute the norm; an infinite bound logs it.
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
