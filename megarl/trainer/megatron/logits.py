"""Compute logits of a model in one process, from any source of its Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megarl.config.parallel import ParallelConfig
from megarl.models.table import Architecture


def logits(
    architecture: Architecture, read: Callable[[str], torch.Tensor], token_ids: list[int]
) -> torch.Tensor:
    """Return fp32 logits [n, V] of one sequence, computed by MegaRL's Megatron model.

    ``read`` returns a whole Hugging Face tensor by name; it is called once per parameter the tensor fills.

    Raises:
        UserError: the architecture cannot be built.
    """
    from megarl.trainer.megatron.initialize import finalize, initialize

    context = initialize(ParallelConfig(), seed=1)
    from megarl.trainer.megatron.attention import PackedMicrobatch
    from megarl.trainer.megatron.model import build_model
    from megarl.weights.hf import region_index

    try:
        model = build_model(architecture.spec, context.layout, torch.float32, context.platform.device)
        params = dict(model.named_parameters())
        with torch.no_grad():
            for region in architecture.trainer_regions(context.layout, context.at):
                part = read(region.hf)[tuple(slice(*span) for span in region.box)]
                params[region.param][region_index(region.index)].copy_(part)
            positions = torch.arange(len(token_ids))
            packed = PackedMicrobatch(qkv_format="thd", lengths=[len(token_ids)], position_ids=positions)
            ids = torch.tensor(token_ids)
            hidden = model(ids[None], positions[None], None, packed_seq_params=packed)
            return hidden[:, 0] @ model.head_weight().T
    finally:
        finalize()
