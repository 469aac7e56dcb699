"""Attention of packed sequences in one call: torch's variable-length FlashAttention, on a GPU and in 16 bits.

Nothing is padded, and without shared prefixes nothing is gathered. With fewer queries than keys, the kernel
aligns the causal mask to their ends, so a sequence sees all of the prefix that it continues.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

_HEAD_MULTIPLE, _LARGEST_HEAD = 8, 256
_LARGEST_HEAD_ELSEWHERE = 192
"""Heads up to this size have a backward pass on every GPU since Ampere, larger ones on those below."""
_LARGE_HEADS = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True, slots=True)
class Spans:
    """Bounds of the sequences of a microbatch, and of the keys each attends to.

    ``keys`` [K] are the tokens attended to, sequence by sequence; None if they are the packed row itself.
    """

    cu_queries: torch.Tensor  # [S + 1] int32
    cu_keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    keys: torch.Tensor | None = None

    @classmethod
    def of(
        cls, lengths: list[int], device: torch.device, prefixes: list[tuple[int, int] | None] | None = None
    ) -> Spans:
        """Return the spans of sequences in a row; ``prefixes`` as in PackedRow."""
        starts = [0, *accumulate(lengths)]
        cu_queries = torch.tensor(starts, dtype=torch.int32).to(device)
        if prefixes is None or not any(prefixes):
            return cls(cu_queries, cu_queries, max(lengths), max(lengths))
        before = [prefix or (0, 0) for prefix in prefixes]
        seen = [stop - start + length for (start, stop), length in zip(before, lengths, strict=True)]
        rows = [
            torch.arange(*span)
            for prefix, start, length in zip(before, starts, lengths, strict=False)
            for span in (prefix, (start, start + length))
        ]
        cu_keys = torch.tensor([0, *accumulate(seen)], dtype=torch.int32).to(device)
        return cls(cu_queries, cu_keys, max(lengths), max(seen), torch.cat(rows).to(device))


def takes(q: torch.Tensor) -> bool:
    """Return True if the kernel supports heads like those of ``q`` [T, heads, d], forward and backward."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not {"window_size", "scale"} <= _parameters():
        return False
    capability, head = torch.cuda.get_device_capability(q.device), q.shape[-1]
    largest = _LARGEST_HEAD if capability in _LARGE_HEADS else _LARGEST_HEAD_ELSEWHERE
    return capability >= (8, 0) and head % _HEAD_MULTIPLE == 0 and head <= largest


@cache
def _parameters() -> frozenset[str]:
    """Return the parameters of torch's Python function for the kernel; empty if there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each sequence: q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d].

    With ``window`` a token attends to that many tokens, itself included.
    """
    from torch.nn.attention.varlen import varlen_attn

    if spans.keys is not None:
        k, v = k.index_select(0, spans.keys), v.index_select(0, spans.keys)
    # The kernel supports fewer key heads than query heads itself; torch 2.11 has no argument for it.
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1] and "enable_gqa" in _parameters():
        grouped["enable_gqa"] = True
    out = varlen_attn(
        q,
        k,
        v,
        spans.cu_queries,
        spans.cu_keys,
        spans.longest_queries,
        spans.longest_keys,
        scale=scale,
        # All tokens before, or the last few, and none after: causal.
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out
