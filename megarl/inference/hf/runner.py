"""A scheduler's interface to a model: room for requests, and one forward pass over some of them.

:class:`PagedRunner` computes all of them in one pass. :class:`RowRunner` computes one after another with the
model's own cache, for models that do not let tokens of several requests stand in one row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from megarl.inference.hf.attention import (
    LayerPages,
    LayerShape,
    PackedStep,
    Prefill,
    attending,
    make_pages,
    page_bytes,
)
from megarl.inference.hf.model import forward, takes
from megarl.inference.hf.pages import PAGE, PageTable, digests
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.inference.memory_use import tensors_in
from megarl.platform import memory
from megarl.records import NO_LOGPROBS, TokenIds


@dataclass(slots=True, eq=False)
class Decoding:
    """A request on its way. ``cached`` of its ``tokens`` (prompt and response) have keys and values.

    A request that waits, or whose memory was taken away, has no slot and nothing cached.
    """

    request: GenerateRequest
    sampling: SamplingConfig
    seed: int
    tokens: list[int]
    limit: int  # tokens of prompt and response at which it ends
    slot: int = -1
    cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)  # [policy version, tokens]

    @property
    def num_drawn(self) -> int:
        """Tokens of the response so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def take(self, token: int, logprob: float, policy_version: int) -> None:
        """Append what was drawn."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if not self.spans or self.spans[-1][0] != policy_version:
            self.spans.append([policy_version, 0])
        self.spans[-1][1] += 1

    def finish_reason(self) -> str | None:
        """Return why it ends with its newest token; None if it continues."""
        if self.tokens[-1] in self.sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def response(self, finish_reason: Any, policy_version: int) -> GeneratedResponse:
        """Return the response so far."""
        spans = [(version, count) for version, count in self.spans]
        return GeneratedResponse(
            request_id=self.request.request_id,
            token_ids=self.token_array()[len(self.request.prompt_ids) :],
            logprobs=np.array(self.logprobs, np.float32) if self.sampling.logprobs else NO_LOGPROBS,
            finish_reason=finish_reason,
            policy_version=spans[0][0] if spans else policy_version,
            version_spans=spans if len(spans) > 1 else [],
        )

    def token_array(self) -> TokenIds:
        """Prompt and response."""
        return np.array(self.tokens, np.int32)


class Runner(Protocol):
    """Memory for requests and the model's forward pass. All of it on one thread."""

    def admit(self, one: Decoding) -> bool:
        """Room for all its tokens; what is known of its prefix is cached then. False: not now."""
        ...

    def share(self, one: Decoding, leader: Decoding) -> bool:
        """Room for a request with the leader's tokens, and the leader's keys and values. False: not now."""
        ...

    def extend(self, one: Decoding) -> bool:
        """Room for one more token. False where there is none."""
        ...

    def compute(self, decoded: Sequence[Decoding], prefilled: Sequence[Decoding]) -> torch.Tensor:
        """Logits [decoded + prefilled, V] after the newest token of each, which is then cached."""
        ...

    def release(self, those: Sequence[Decoding], *, keep: bool) -> None:
        """They need no room any more; with ``keep`` what they hold may be found by prompts to come."""
        ...

    def clear(self) -> None:
        """Forget all keys and values, of running requests too."""
        ...

    def sleep(self) -> None:
        """Give the memory of keys and values back; it is taken again by itself."""
        ...

    def kv_caches(self) -> list[Any]:
        """Return keys and values, tensors in whatever they are kept in; for their size."""
        ...


class PagedRunner:
    """Every request in one forward pass, keys and values in pages of a pool.

    Args:
        model: of :func:`megarl.inference.hf.model.build_model`.
        shapes: of its layers (:func:`megarl.inference.hf.model.measure`).
        num_pages: of the pool.
        keep_prefixes: whether pages of requests are found by others.
    """

    def __init__(
        self, model: torch.nn.Module, shapes: dict[int, LayerShape], num_pages: int, *, keep_prefixes: bool
    ) -> None:
        self._model, self._shapes, self._keep_prefixes = model, shapes, keep_prefixes
        example = next(model.parameters())
        self._dtype, self._device = example.dtype, example.device
        self._table = PageTable(num_pages, self._copy)
        self._pages: dict[int, LayerPages] | None = None
        self._free: list[int] = []
        self._num_slots = 0
        self.tokens_computed = 0
        """Of all forward passes so far."""

    def admit(self, one: Decoding) -> bool:
        """See Runner.admit."""
        if not self._reserve(one):
            return False
        if self._keep_prefixes:
            # At least the newest token is computed: its logits are wanted.
            found = self._table.find(digests(one.token_array()[:-1]))
            self._copy(found, self._table.pages[one.slot][: len(found)])
            one.cached = len(found) * PAGE
        return True

    def share(self, one: Decoding, leader: Decoding) -> bool:
        """See Runner.share."""
        if not self._reserve(one):
            return False
        pages = self._table.pages
        self._copy(pages[leader.slot], pages[one.slot])
        one.cached = leader.cached
        return True

    def extend(self, one: Decoding) -> bool:
        """See Runner.extend."""
        if len(one.tokens) > len(self._table.pages[one.slot]) * PAGE:
            if not self._table.room:
                return False
            self._table.extend(one.slot, 1)
        return True

    def compute(self, decoded: Sequence[Decoding], prefilled: Sequence[Decoding]) -> torch.Tensor:
        """See Runner.compute."""
        step, tokens, positions, wanted = self._pack(decoded, prefilled)
        with attending(step):
            logits = forward(self._model, tokens, positions, wanted)
        self.tokens_computed += tokens.shape[1]
        for one in (*decoded, *prefilled):
            one.cached = len(one.tokens)
        if self._keep_prefixes:
            for one in prefilled:
                self._table.know(one.slot, digests(one.token_array()))
        return logits

    def release(self, those: Sequence[Decoding], *, keep: bool) -> None:
        """See Runner.release."""
        keep = keep and self._keep_prefixes
        for one in those:
            if keep:
                self._table.know(one.slot, digests(one.token_array()[: one.cached]))
        self._table.release([one.slot for one in those], keep=keep)
        for one in those:
            self._free.append(one.slot)
            one.slot, one.cached = -1, 0

    def clear(self) -> None:
        """See Runner.clear."""
        self._table.clear()

    def sleep(self) -> None:
        """See Runner.sleep."""
        self.clear()
        self._pages = None
        memory.release_unused()

    def kv_caches(self) -> list[Any]:
        """See Runner.kv_caches."""
        return [(layer.keys, layer.values) for layer in (self._pages or {}).values()]

    def _reserve(self, one: Decoding) -> bool:
        count = -(-len(one.tokens) // PAGE)
        if count > self._table.room:
            return False
        if not self._free:
            self._free.append(self._num_slots)
            self._num_slots += 1
        one.slot, one.cached = self._free.pop(), 0
        self._table.extend(one.slot, count)
        return True

    def _pool(self) -> dict[int, LayerPages]:
        if self._pages is None:
            self._pages = make_pages(self._shapes, self._table.num_pages, self._dtype, self._device)
        return self._pages

    @torch.inference_mode()
    def _copy(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        source, target = self._tensor(sources), self._tensor(targets)
        for layer in self._pool().values():
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]

    def _pack(
        self, decoded: Sequence[Decoding], prefilled: Sequence[Decoding]
    ) -> tuple[PackedStep, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The step, tokens [1, T], their positions [1, T], and the places whose logits are wanted."""
        table, count = self._table, len(decoded)
        tokens = [one.tokens[-1] for one in decoded]
        positions = [np.array([len(one.tokens) - 1 for one in decoded], np.int64)]
        pages = [np.array([table.pages[one.slot][-1] for one in decoded], np.int64)]
        prefills, wanted = [], list(range(count))
        for one in prefilled:
            own, start = np.array(table.pages[one.slot], np.int64), len(tokens)
            tokens += one.tokens[one.cached :]
            positions.append(np.arange(one.cached, len(one.tokens)))
            pages.append(own[positions[-1] // PAGE])
            prefills.append(Prefill(start, len(tokens), one.cached, self._tensor(own)))
            wanted.append(len(tokens) - 1)
        row_of_slot = np.full(self._num_slots + 1, count, np.int64)  # the last is of pages without a slot
        row_of_slot[[one.slot for one in decoded]] = np.arange(count)
        position = np.concatenate(positions)
        step = PackedStep(
            self._pool(),
            count,
            owner=self._tensor(row_of_slot[table.owner[: table.used]]),
            positions=self._tensor(table.start[: table.used, None] + np.arange(PAGE)),
            lengths=self._tensor([*(len(one.tokens) for one in decoded), 0]),
            page=self._tensor(np.concatenate(pages)),
            offset=self._tensor(position % PAGE),
            prefills=prefills,
        )
        return step, self._tensor([tokens]), self._tensor(position)[None], self._tensor(wanted)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self._device)


class RowRunner:
    """One request after another, each with the cache that the model makes itself (a batch of one).

    Args:
        model: with an attention of transformers' own.
        max_bytes: of all caches; one request is always let in.
    """

    def __init__(self, model: Any, max_bytes: int) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._device = next(model.parameters()).device
        # What state-space models call it.
        self._cache_name = "cache_params" if takes(model, "cache_params") else "past_key_values"
        self._caches: dict[int, Any] = {}
        self._next_slot = 0
        self.tokens_computed = 0
        """Of all forward passes so far."""

    def admit(self, one: Decoding) -> bool:
        """See Runner.admit."""
        if not self._has_room():
            return False
        one.slot, one.cached = self._next_slot, 0
        self._caches[one.slot] = None
        self._next_slot += 1
        return True

    def share(self, one: Decoding, leader: Decoding) -> bool:
        """See Runner.share."""
        if not self.admit(one):
            return False
        self._caches[one.slot] = copy.deepcopy(self._caches[leader.slot])
        one.cached = leader.cached
        return True

    def extend(self, one: Decoding) -> bool:
        """See Runner.extend."""
        return len(self._caches) == 1 or self._has_room()

    def compute(self, decoded: Sequence[Decoding], prefilled: Sequence[Decoding]) -> torch.Tensor:
        """See Runner.compute."""
        return torch.stack([self._logits(one) for one in (*decoded, *prefilled)])

    def release(self, those: Sequence[Decoding], *, keep: bool) -> None:
        """See Runner.release; nothing is kept."""
        for one in those:
            del self._caches[one.slot]
            one.slot, one.cached = -1, 0

    def clear(self) -> None:
        """See Runner.clear."""
        self._caches.clear()

    def sleep(self) -> None:
        """See Runner.sleep."""
        self.clear()
        memory.release_unused()

    def kv_caches(self) -> list[Any]:
        """See Runner.kv_caches."""
        return list(self._caches.values())

    def _logits(self, one: Decoding) -> torch.Tensor:
        ids = torch.tensor([one.tokens[one.cached :]], device=self._device)
        cache = self._caches[one.slot]
        some = {} if cache is None else {self._cache_name: cache}
        out = self._model(input_ids=ids, use_cache=True, **some)
        cache = self._caches[one.slot] = getattr(out, self._cache_name, None)
        one.cached = len(one.tokens) if cache is not None else 0
        self.tokens_computed += ids.shape[1]
        return out.logits[0, -1]

    def _has_room(self) -> bool:
        held = sum(part.nbytes for cache in self._caches.values() for part in tensors_in(cache))
        return not self._caches or held < self._max_bytes


def num_pages(shapes: dict[int, LayerShape], dtype: torch.dtype, max_bytes: int) -> int:
    """Pages of a pool that takes max_bytes."""
    return max_bytes // page_bytes(shapes, dtype)
