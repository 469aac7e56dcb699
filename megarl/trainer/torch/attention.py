"""Transformers' attention interface on packed rows, so that any of its decoders computes them.

A model built with :data:`NAME` as its attention asks for no mask and calls :func:`packed_attention` in every
layer. Which sequences lie in the row it cannot say: not every model hands keyword arguments down to its
attention. The row is therefore set beside the model (:func:`of_row`), from the beginning of a microbatch's
forward pass to the end of its backward pass, in which recomputed layers ask again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megarl.errors import UserError
from megarl.records import PackedBatch
from megarl.trainer.packed_attention import PackedRow, Variant, packed_causal_attention, prefix_spans

NAME = "megarl_packed"
"""Of the attention in a configuration of transformers."""
RECOMPUTED = "megarl_packed_recomputed"
"""The same, computed again in the backward pass instead of kept."""

_row: PackedRow | None = None  # backward passes run on threads of autograd's own: no thread-local state


def row_of(batch: PackedBatch) -> PackedRow:
    """Return what attention reads of a microbatch."""
    return PackedRow(batch.cu_seqlens.diff().tolist(), prefix_spans(batch))


@contextmanager
def of_row(row: PackedRow) -> Iterator[None]:
    """Inside, attention of any model is that of the sequences of ``row``."""
    global _row
    assert _row is None, "one row at a time"
    _row = row
    try:
        yield
    finally:
        _row = None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, d], key [1, kv_heads, T, d], value [1, kv_heads, T, w] -> [1, T, heads, w]."""
    row = _checked_row(module, attention_mask, sliding_window)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    width = v.shape[-1]
    if width < q.shape[-1]:  # the fast kernels want equal heads; zeros beside the values change nothing
        v = F.pad(v, (0, q.shape[-1] - width))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_causal_attention(q, k, v, row, scale, Variant(sliding_window, softcap, s_aux))
    return out[None, ..., :width], None


def recomputed_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """As :func:`packed_attention`; nothing of it but its inputs is kept for the backward pass."""
    out: tuple[torch.Tensor, None] = checkpoint(packed_attention, *args, use_reentrant=False, **kwargs)
    return out


def _checked_row(module: torch.nn.Module, mask: torch.Tensor | None, window: int | None) -> PackedRow:
    """The row that is computed; UserError where the layer wants what it has not said here."""
    assert _row is not None, "attention outside of a microbatch"
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds is not None and layer is not None else "full_attention"
    if mask is not None or (kind == "sliding_attention" and window is None):
        name = type(module).__name__
        raise UserError(f"model.path: {name} masks attention in a way that packed sequences cannot have")
    return _row


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(RECOMPUTED, recomputed_attention)
