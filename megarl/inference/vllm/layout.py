"""Find vLLM layers that do not read weights as stored, and so cannot use the trainer's memory.

Some kernels need another order and rewrite the weight once, after loading: FlashInfer's expert kernels
exchange gate and up (Cutlass) or shuffle rows into blocks (TensorRT-LLM), and on Blackwell they are vLLM's
first choice. A weight written later, by the trainer or a copy, would be read in the wrong order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

_AS_STORED = (
    UnquantizedMoeBackend.TRITON,
    UnquantizedMoeBackend.BATCHED_TRITON,
    UnquantizedMoeBackend.CPU,  # as extension.py runs it
)


def foreign_layouts(model: torch.nn.Module) -> list[str]:
    """Return a sentence for each kind of layer whose kernel reads its weights in a different order."""
    first: dict[str, str] = {}
    for name, sentence in _rewriting_layers(model):
        first.setdefault(sentence, name)
    return [f"{name}: {sentence}" for sentence, name in first.items()]


def _rewriting_layers(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            if method.unquantized_backend not in _AS_STORED:
                kernel = method.unquantized_backend.value
                yield name, f"its {kernel} kernel rearranges the experts (needed: Triton)"
        elif isinstance(method, QuantizeMethodBase) and not isinstance(
            method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod
        ):
            yield name, f"its weights are quantized ({type(method).__name__})"
