"""Reduce the results of all ranks' microbatches to metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from megarl.cluster.collectives import gather
from megarl.losses.base import LossResult, LossTokens
from megarl.losses.logprob_mismatch import LogprobMismatch, measure_mismatch
from megarl.records import NON_FINITE_WEIGHTS
from megarl.trainer.interface import RankContext


def reduce_results(results: list[LossResult]) -> dict[str, float]:
    """Return means and maxima over microbatches and ranks of the ranks' ``run`` results."""
    scalars = [(r.sums, r.token_sums, r.maxima) for r in results]
    values = iter(_on_host([value for parts in scalars for part in parts for value in part.values()]))
    local = [[{name: next(values) for name in part} for part in parts] for parts in scalars]
    parts = [part for rank in gather(local) for part in rank]

    def over_all(index: int, combine: Callable[[Iterable[float]], float]) -> dict[str, float]:
        names = dict.fromkeys(name for part in parts for name in part[index])
        return {name: combine(p[index][name] for p in parts if name in p[index]) for name in names}

    sums, token_sums = over_all(0, sum), over_all(1, sum)
    weight, num_tokens = sums.pop("weight", 0.0) or 1.0, token_sums.pop("tokens", 0.0) or 1.0
    means = {name: value / weight for name, value in sums.items()}
    return means | {name: value / num_tokens for name, value in token_sums.items()} | over_all(2, _largest)


def _on_host(scalars: list[torch.Tensor]) -> list[float]:
    """Return the values of scalars in one copy: each would wait for the device."""
    if not scalars:
        return []
    values = [torch.as_tensor(scalar) for scalar in scalars]  # a user's loss may give numbers
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    floats: list[float] = torch.stack([value.to(device, torch.float64) for value in values]).tolist()
    return floats


def _largest(values: Iterable[float]) -> float:
    """Return the maximum; NaN if any value is, whatever the order (unlike ``max``)."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def weights_report(tensors: Iterable[torch.Tensor]) -> LossResult:
    """Check trained tensors for NaN or infinity, for :func:`reduce_results`: ``non_finite_weights`` is their
    number on the rank that has most."""
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(held, math.inf)]) if held else None
    count = torch.zeros(()) if norms is None else (~torch.isfinite(norms)).sum()
    return LossResult(torch.zeros(()), maxima={NON_FINITE_WEIGHTS: count})


def mismatch_of(tokens: LossTokens) -> LogprobMismatch:
    """Measure the mismatch of engine and trainer on these tokens; empty without the engine's logprobs."""
    if tokens.rollout_logprobs is None:
        return LogprobMismatch()
    return measure_mismatch(
        tokens.logprobs, tokens.rollout_logprobs, tokens.labels, tokens.sequence_ids, tokens.stale
    )


def reduce_mismatch(context: RankContext, mismatch: LogprobMismatch) -> LogprobMismatch:
    """Sum over the ranks with results of their own (not replicas)."""
    return sum(gather(mismatch if context.has_results else LogprobMismatch()), LogprobMismatch())
