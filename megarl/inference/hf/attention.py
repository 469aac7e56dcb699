"""Attention over pages, behind transformers' attention interface: a forward pass for requests of any length.

The model sees one row of tokens: the newest token of each running request, then whole prompts of new ones.
Everything but attention treats tokens one by one; attention is told by a :class:`PackedStep` who they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from megarl.inference.hf.pages import PAGE

NAME = "megarl_pages"
"""The attention implementation that a model is built with."""
_QUERIES_AT_ONCE = 256  # of a prompt, where scores are made one by one: bounds their memory


class NotPackable(Exception):
    """A model whose tokens cannot stand side by side in one row; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one layer's cache."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def numbers(self) -> int:
        """Per token."""
        return self.num_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Keys [pages, heads, PAGE, key_size] and values [pages, heads, PAGE, value_size] of a layer."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens [start, stop) of the row are a request's, from position ``first`` on, up to its newest."""

    start: int
    stop: int
    first: int
    pages: torch.Tensor  # all of the request's


@dataclass(slots=True)
class PackedStep:
    """One forward pass: ``num_decoded`` rows of one token, then prompts.

    ``owner`` [P] is, of the first P pages of the pool, the number of the row that decodes with it, or
    num_decoded; ``positions`` [P, PAGE] are those of their tokens, ``lengths`` [num_decoded + 1] tokens that
    each row sees, its own included. ``page`` and ``offset`` [T] say where each token's key and value go.
    """

    pages: dict[int, LayerPages]
    num_decoded: int
    owner: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    page: torch.Tensor
    offset: torch.Tensor
    prefills: list[Prefill]
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return the mask added to scores [P, heads, queries, PAGE]: 0 for visible tokens, else -inf."""
        if window not in self._masks:
            length = self.lengths[self.owner][:, None]
            seen = self.positions < length
            if window is not None:
                seen &= self.positions >= length - window
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Attention settings of a layer."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [query heads]


_current: Callable[..., torch.Tensor] | None = None


@contextmanager
def attending(step: PackedStep) -> Iterator[None]:
    """Inside, models built with :data:`NAME` attend as ``step`` says."""
    with _answering(lambda layer, query, key, value, rules: _attend(step, layer, query, key, value, rules)):
        yield


@contextmanager
def measuring(shapes: dict[int, LayerShape]) -> Iterator[None]:
    """Inside, nothing is attended to; the layers' shapes are noted."""

    def note(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: _Rules
    ) -> torch.Tensor:
        if layer in shapes:
            raise NotPackable(f"layer {layer} attends twice")
        shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        return value.new_zeros(query.shape[0], query.shape[1], value.shape[2])

    with _answering(note):
        yield


@contextmanager
def _answering(answer: Callable[..., torch.Tensor]) -> Iterator[None]:
    global _current
    _current = answer
    try:
        yield
    finally:
        _current = None


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that transformers calls: query [1, Hq, T, D], key [1, H, T, D], value [1, H, T, Dv].

    Returns [1, T, Hq, Dv]. Raises NotPackable for what pages cannot do.
    """
    assert _current is not None, "a forward pass outside of a step"
    layer = getattr(module, "layer_idx", None)
    if layer is None or is_causal is False or attention_mask is not None or query.shape[0] != 1:
        raise NotPackable(f"{type(module).__name__} is not plain causal attention")
    if query.shape[2] != key.shape[2]:
        raise NotPackable(f"{type(module).__name__} has other keys than those of its tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (part[0].transpose(0, 1) for part in (query, key, value))
    return _current(int(layer), *rows, _Rules(scale, sliding_window, softcap, s_aux))[None], None


def _attend(
    step: PackedStep, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: _Rules
) -> torch.Tensor:
    """query [T, Hq, D], key [T, H, D], value [T, H, Dv] -> [T, Hq, Dv]; keys and values go to their pages."""
    pool = step.pages[layer]
    pool.keys[step.page, :, step.offset] = key
    pool.values[step.page, :, step.offset] = value
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    count = step.num_decoded
    if count:
        out[:count] = _decode(step, pool, query[:count], rules)
    for prefill in step.prefills:
        part = slice(prefill.start, prefill.stop)
        keys, values = key[part], value[part]
        if prefill.first:
            size = prefill.first + prefill.stop - prefill.start
            keys, values = (
                pages[prefill.pages].transpose(1, 2).flatten(0, 1)[:size]
                for pages in (pool.keys, pool.values)
            )
        out[part] = _prefill(query[part], keys, values, prefill.first, rules)
    return out


def _decode(step: PackedStep, pool: LayerPages, query: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """One query per row [B, Hq, D] -> [B, Hq, Dv]: each page by itself, then the pages of a row together.

    A softmax in parts (Dao et al., Flash-Decoding): of every page the largest score, and what is summed.
    """
    (count, num_queries, size), heads = query.shape, pool.keys.shape[1]
    num_pages = len(step.owner)
    grouped = query.view(count, heads, num_queries // heads, size)
    rows = torch.cat([grouped, torch.zeros_like(grouped[:1])])  # the last one is of pages that nobody reads
    scores = (rows[step.owner] @ pool.keys[:num_pages].transpose(-1, -2)).float().mul_(rules.scale)
    if rules.softcap is not None:
        scores = torch.tanh_(scores.div_(rules.softcap)).mul_(rules.softcap)
    scores += step.mask(rules.window)
    largest = torch.full(rows.shape[:3], -torch.inf, device=query.device)
    if rules.sinks is not None:
        largest[:] = rules.sinks.float().view(heads, -1)
    sinks = largest.clone()
    by_head = step.owner[:, None, None].expand(num_pages, *rows.shape[1:3])
    largest.scatter_reduce_(0, by_head, scores.amax(-1), "amax")
    weights = scores.sub_(largest[step.owner][..., None]).exp_()
    total = (sinks - largest).exp_().index_add_(0, step.owner, weights.sum(-1))
    parts = (weights.to(pool.values.dtype) @ pool.values[:num_pages]).float()
    out = torch.zeros(*rows.shape[:3], parts.shape[-1], device=query.device).index_add_(0, step.owner, parts)
    return (out[:count] / total[:count, ..., None]).to(query.dtype).flatten(1, 2)


def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, rules: _Rules
) -> torch.Tensor:
    """Queries [N, Hq, D] of positions first, first + 1, ... over keys and values [first + N, H, D]."""
    groups = query.shape[1] // key.shape[1]
    queries, keys, values = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    keys, values = (part.repeat_interleave(groups, 0) if groups > 1 else part for part in (keys, values))
    plain = rules.softcap is None and rules.sinks is None
    if plain and not first and (rules.window is None or rules.window >= len(query)):
        out = functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=rules.scale
        )[0]
        return out.transpose(0, 1)
    parts = []
    for start in range(0, len(query), _QUERIES_AT_ONCE):
        part = queries[:, start : start + _QUERIES_AT_ONCE]
        position = torch.arange(first + start, first + start + part.shape[1], device=query.device)[:, None]
        place = torch.arange(len(key), device=query.device)
        seen = place <= position
        if rules.window is not None:
            seen &= place > position - rules.window
        parts.append(_scored(part, keys, values, seen, rules))
    return torch.cat(parts, 1).transpose(0, 1)


def _scored(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, rules: _Rules
) -> torch.Tensor:
    """[Hq, N, D], [Hq, L, D], [Hq, L, Dv], seen [N, L] -> [Hq, N, Dv]."""
    scores = (queries @ keys.transpose(-1, -2)).float() * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if rules.sinks is not None:
        sink = rules.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return weights.to(values.dtype) @ values


def page_bytes(shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes of a page in all layers."""
    return PAGE * dtype.itemsize * sum(shape.numbers for shape in shapes.values())


def make_pages(
    shapes: dict[int, LayerShape], num_pages: int, dtype: torch.dtype, device: torch.device
) -> dict[int, LayerPages]:
    """A pool of zeros; on a CPU its memory is taken where it is first written."""

    def zeros(heads: int, size: int) -> torch.Tensor:
        shape = (num_pages, heads, PAGE, size)
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    return {
        layer: LayerPages(zeros(shape.num_heads, shape.key_size), zeros(shape.num_heads, shape.value_size))
        for layer, shape in shapes.items()
    }
