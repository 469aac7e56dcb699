"""Measure a real trainer's memory on its ranks; heavy imports are inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence, TrainBatch
from megarl.trainer.passes import train_step


def build(context: Any, model_dir: str, *, distributed: bool = False, dtype: str = "float32") -> Any:
    """Build a policy on this rank whose microbatches hold all the test's sequences."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    return MegatronTrainer(
        context,
        load_architecture(model_dir),
        ModelConfig(path=model_dir, dtype=dtype),
        PackingConfig(max_tokens_per_microbatch=4096),
        OptimizerConfig(lr=1e-3, distributed=distributed),
        2,
    )


def sequences(count: int, length: int) -> TrainBatch:
    """Every token but the first has a loss."""
    ids = (7 * np.arange(count)[:, None] + 3 * np.arange(length)) % 250
    return TrainBatch.of(TokenSequence(each, np.arange(length) > 0) for each in ids)


def state_bytes(context: Any, model_dir: str, distributed: bool, dtype: str) -> dict[str, Any]:
    """Shapes of all parameters; bytes of parameters, of gradients, and of master copies and moments."""
    policy = build(context, model_dir, distributed=distributed, dtype=dtype)
    train_step(policy, policy.prepare(sequences(4, 16), "token").batches, sft_loss, temperature=1.0)
    params = list(policy.params.values())
    optimizer = 0
    own = {param.data_ptr() for param in params}
    for megatron in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = megatron.optimizer
        kept = [master for group in inner.param_groups for master in group["params"]]
        kept += [value for state in inner.state.values() for value in state.values()]
        # Shards of float32 parameters are views of them; the step count is no state of a parameter.
        optimizer += sum(
            t.nbytes for t in kept if t.dim() and not _inside(t, params) and t.data_ptr() not in own
        )
    return {
        "shapes": {name: tuple(param.shape) for name, param in policy.params.items()},
        "parameters": sum(param.nbytes for param in params),
        "gradients": sum(param.main_grad.nbytes for param in params),
        "optimizer": optimizer,
    }


def _inside(tensor: torch.Tensor, params: list[torch.Tensor]) -> bool:
    return any(param.data_ptr() <= tensor.data_ptr() < param.data_ptr() + param.nbytes for param in params)


def kept_bytes(context: Any, model_dir: str, count: int, length: int) -> int:
    """Bytes that the forward pass of one microbatch of ``count`` sequences keeps for the backward pass."""
    policy = build(context, model_dir)
    known = {param.untyped_storage().data_ptr() for param in policy.params.values()}
    kept: dict[int, torch.UntypedStorage] = {}  # storages: alive, so that no address comes twice
    backward = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not backward and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal backward
        backward = True  # what is packed from here on is computed again
        return tensor

    batches = policy.prepare(sequences(count, length), "token").batches
    assert len(batches) == 1
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        train_step(policy, batches, sft_loss, temperature=1.0)
    return sum(storage.nbytes() for storage in kept.values())
