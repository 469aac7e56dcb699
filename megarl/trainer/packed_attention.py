"""Causal attention of sequences packed end to end, for any backend.

A row of sequences takes one call if torch has a kernel for it (:mod:`megarl.trainer.varlen`), else one call
for each bucket of sequences of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megarl.records import PackedBatch
from megarl.trainer.varlen import Spans, takes, varlen_attention

_MAX_PADDED_RATIO = 1.3
"""A bucket of sequences is padded to its longest; more waste than this starts a new bucket."""


@dataclass
class PackedRow:
    """The sequences of a packed row, and values that every layer would otherwise recompute.

    ``lengths`` are padded lengths. ``prefixes`` gives, for each sequence that continues another one, that
    one's tokens [start, stop) in the row.
    """

    lengths: list[int] = field(default_factory=list)
    prefixes: list[tuple[int, int] | None] | None = None
    buckets: list[Bucket] | None = None
    unbucket: torch.Tensor | None = None  # [T] into the buckets' padded tokens
    spans: Spans | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, padded to ``longest``: rows of token indices [B, longest].

    With a ``prefix`` [start, stop) all of them attend to it first.
    """

    index: torch.Tensor
    longest: int
    prefix: tuple[int, int] | None = None

    def keys(self) -> torch.Tensor:
        """Return the indices [B, m] of the tokens that the rows attend to, in order of position."""
        if self.prefix is None:
            return self.index
        prefix = torch.arange(*self.prefix, device=self.index.device)
        return torch.cat((prefix.expand(self.index.shape[0], -1), self.index), dim=1)


def prefix_spans(batch: PackedBatch) -> list[tuple[int, int] | None] | None:
    """Return each sequence's prefix as a span of the packed row, without padding."""
    if batch.prefixes is None:
        return None
    assert batch.lengths is not None
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    return [(starts[p], starts[p] + lengths[p]) if p >= 0 else None for p in batch.prefixes.tolist()]


def make_buckets(
    lengths: list[int], device: torch.device, prefixes: list[tuple[int, int] | None] | None = None
) -> tuple[list[Bucket], torch.Tensor]:
    """Group sequences into few attention calls; also return the indices back to packed order.

    Padding slots repeat a sequence's last token; under a causal mask no real token sees them. Sequences share
    a bucket only if they have the same prefix, or none.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    of = prefixes or [None] * len(lengths)
    groups: list[list[int]] = []
    real = 0
    for s in sorted(range(len(lengths)), key=lambda i: (of[i] or (-1, -1), -lengths[i])):
        longest = lengths[groups[-1][0]] if groups else 0
        alike = groups and of[groups[-1][0]] == of[s]
        if alike and longest * (len(groups[-1]) + 1) <= _MAX_PADDED_RATIO * (real + lengths[s]):
            groups[-1].append(s)
            real += lengths[s]
        else:
            groups.append([s])
            real = lengths[s]
    way_back = torch.empty(starts[-1], dtype=torch.int64)
    buckets, offset = [], 0
    for group in groups:
        longest = lengths[group[0]]
        steps = torch.arange(longest)
        first = torch.tensor([starts[s] for s in group])[:, None]
        last = torch.tensor([starts[s] + lengths[s] - 1 for s in group])[:, None]
        index = torch.minimum(first + steps, last)
        buckets.append(Bucket(index.to(device), longest, of[group[0]]))
        for row, s in enumerate(group):
            begin = offset + row * longest
            way_back[starts[s] : starts[s + 1]] = torch.arange(begin, begin + lengths[s])
        offset += len(group) * longest
    return buckets, way_back.to(device)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model's differences from plain causal attention.

    ``window``: number of tokens that a token attends to, itself included; None: all before it. ``softcap``
    bounds the scores: cap * tanh(score / cap). ``sinks`` [heads] are scores of a key without a value.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def needs_scores(self) -> bool:
        """True if no torch kernel computes it."""
        return self.softcap is not None or self.sinks is not None


PLAIN = Variant()


def packed_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: PackedRow,
    scale: float,
    variant: Variant = PLAIN,
) -> torch.Tensor:
    """Causal attention within each sequence: q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d].

    Takes one call if torch has a kernel for it, else one for each bucket of sequences of similar length.
    """
    if takes(q) and not variant.needs_scores:
        if packed.spans is None:
            packed.spans = Spans.of(packed.lengths, q.device, packed.prefixes)
        return varlen_attention(q, k, v, packed.spans, scale, variant.window)
    if packed.buckets is None:
        packed.buckets, packed.unbucket = make_buckets(packed.lengths, q.device, packed.prefixes)
    outs = []
    for bucket in packed.buckets:
        rows, keys = bucket.index.shape[0], bucket.keys()
        q_b, k_b, v_b = (
            x.index_select(0, index.flatten()).view(*index.shape, x.shape[1], -1).transpose(1, 2)
            for x, index in ((q, bucket.index), (k, keys), (v, keys))
        )
        out = _bucket_attention(q_b, k_b, v_b, bucket, scale, variant)
        outs.append(out.transpose(1, 2).reshape(rows * bucket.longest, q.shape[1], -1))
    assert packed.unbucket is not None
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, packed.unbucket)


def _bucket_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bucket: Bucket, scale: float, variant: Variant
) -> torch.Tensor:
    """q [B, heads, n, d], k and v [B, kv_heads, m, d] -> [B, heads, n, d]."""
    if variant.needs_scores:
        return _plain_attention(q, k, v, bucket, scale, variant)
    if q.device.type != "cpu" and k.shape[1] < q.shape[1]:
        # Otherwise only FlashAttention accepts fewer keys than queries, but neither masks nor float32:
        # torch would fall back to whole matrices of scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = _mask(bucket, k.shape[2], variant.window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bucket: Bucket, scale: float, variant: Variant
) -> torch.Tensor:
    """See :func:`_bucket_attention`; stores the scores [B, heads, n, m], softmax in fp32."""
    heads, count = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * scale
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    mask = _mask(bucket, count, variant.window, q.device)
    if mask is None:
        mask = torch.ones(bucket.longest, count, dtype=torch.bool, device=q.device).tril()
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.float().view(1, heads, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return scores.softmax(dim=-1)[..., :count].to(v.dtype) @ v


def _mask(bucket: Bucket, count: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask [n, count] bool of a bucket's rows: the prefix, and causally each other.

    Only the last ``window`` keys, if fewer. None if it equals SDPA's causal mask.
    """
    limited = window is not None and window < count
    if bucket.prefix is None and not limited:
        return None
    before = count - bucket.longest
    mask = torch.ones(bucket.longest, count, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before - window + 1) if limited and window is not None else mask
