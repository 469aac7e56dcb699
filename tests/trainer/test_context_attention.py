"""Attention over context-parallel ranks: exact, with memory divided among them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import context_ranks
from tests.trainer.world import RankError, world

LENGTHS = [24, 8, 48, 16]
PREFIXES = [None, (0, 21), (0, 21), None]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
def test_equals_dense_attention(size: int, prefixes: list[Any] | None) -> None:
    """Output and gradients in float64 against one softmax over a full mask."""
    torch.manual_seed(3)
    total, scale = sum(LENGTHS), 0.3
    q, k, v, grad = (torch.randn(total, heads, 6, dtype=torch.float64) for heads in (4, 2, 2, 4))
    starts = [0, *accumulate(LENGTHS)]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for number, length in enumerate(LENGTHS):
        own = slice(starts[number], starts[number] + length)
        mask[own, own] = torch.ones(length, length).tril().bool()
        if prefixes and prefixes[number]:
            mask[own, slice(*prefixes[number])] = True
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    heads = [x.repeat_interleave(4 // x.shape[1], dim=1).transpose(0, 1) for x in inputs]
    scores = (heads[0] @ heads[1].mT * scale).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ heads[2]).transpose(0, 1)
    expected.backward(grad)
    arguments = ([x.numpy() for x in (q, k, v, grad)], LENGTHS, prefixes, scale)
    results = world(size).run(context_ranks.attention, *arguments, parallel={"context_parallel_size": size})
    found = [np.empty(x.shape) for x in (q, q, k, v)]
    for rows, parts in results:
        for whole, part in zip(found, parts, strict=True):
            whole[rows] = part
    for value, reference in zip(found, (expected.detach(), *(x.grad for x in inputs)), strict=True):
        assert reference is not None
        assert np.abs(value - reference.numpy()).max() < 1e-12


def test_other_devices_kernel_takes_its_arguments() -> None:
    """The kernel for GPUs on tensors without data: shapes and schema hold; nothing is computed here."""
    from megarl.trainer.megatron.context_attention import _attend, _attend_backward

    q, k = (torch.empty(40, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (8, 2))
    out, lse = _attend(q, k, k, True, 0.1)
    assert out.shape == q.shape and lse.shape == (40, 8) and lse.dtype == torch.float32
    grads = _attend_backward(out, q, k, k, out, lse, True, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65])
def test_other_devices_kernel_reads_rows_of_log_sum_exps(length: int) -> None:
    """It wants each head's in a row that begins at a multiple of 32, also where nothing has to be padded."""
    from megarl.trainer.megatron.context_attention import _cuda_lse

    lse = torch.randn(length, 3)
    rows = _cuda_lse(lse)
    padded = (length + 31) // 32 * 32
    assert rows.shape == (1, 3, padded) and rows.stride() == (3 * padded, padded, 1)
    assert torch.equal(rows[0, :, :length], lse.T) and bool((rows[0, :, length:] == torch.inf).all())


@pytest.mark.slow
def test_long_context_memory_falls_with_the_ranks(model_dirs: dict[str, str]) -> None:
    """32,768 tokens beside short sequences: a rank of 4 keeps a quarter, and no masks.

    What a step holds at most is measured in torch's allocator, parameters and optimizer not counted.
    """
    model = model_dirs["qwen3-tied"]
    [alone] = world(1).run(context_ranks.long_step, model, 32768)
    four = world(4).run(context_ranks.long_step, model, 32768, parallel={"context_parallel_size": 4})
    for rank in four:
        assert rank["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
        assert rank["metrics"]["grad_norm"] == pytest.approx(alone["metrics"]["grad_norm"], rel=1e-4)
    tokens = alone["tokens"]
    for rank in four:
        assert rank["tokens"] == pytest.approx(tokens / 4, rel=0.01), "the same work for all"
        # A quarter, and while a layer is computed its K and V of all ranks: 0.31 in this model of two layers,
        # and 0.34 once on a loaded machine: one tensor of all tokens more, as if gloo still held a gather's.
        assert rank["peak_bytes"] < 0.345 * alone["peak_bytes"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_learns_what_gathering_learns(model_dirs: dict[str, str], size: int) -> None:
    """Transformer Engine needs a GPU: in its place stands dense attention that takes the same arguments."""
    model, parallel = model_dirs["llama-deep-tied"], {"context_parallel_size": size}
    gathered = world(size).run(context_ranks.train, model, parallel=parallel)
    passed = world(size).run(context_ranks.train, model, parallel=parallel | {"context_attention": "ring"})
    assert np.array_equal(gathered[0], gathered[-1])
    assert np.array(passed) == pytest.approx(np.array(gathered), rel=1e-5)


def test_a_ring_stands_still_for_whole_sequences(model_dirs: dict[str, str]) -> None:
    """Split and whole microbatches in turn: the stand-in keeps the group it was last given."""
    model, parallel = model_dirs["llama-deep-tied"], {"context_parallel_size": 2, "context_split_from": 20}
    alone = world(1).run(context_ranks.train, model)
    passed = world(2).run(context_ranks.train, model, parallel=parallel | {"context_attention": "ring"})
    for rank in passed:
        assert np.array(rank) == pytest.approx(np.array(alone[0]), rel=1e-5)


def test_whole_sequences_gather_no_keys(model_dirs: dict[str, str]) -> None:
    parallel = {"context_parallel_size": 2, "context_split_from": 20}
    for shortest, longest, kinds in ((6, 19, {False}), (20, 40, {True}), (6, 40, {True, False})):
        ranks = world(2).run(
            context_ranks.gathered, model_dirs["qwen3-tied"], shortest, longest, parallel=parallel
        )
        assert {split for split, _, _ in ranks[0]} == kinds
        for mine, theirs in zip(*ranks, strict=True):
            assert mine[0] == theirs[0] and mine[2] == theirs[2]
            assert (mine[2] > 0) == mine[0], "whole microbatches ask nobody for keys"


def test_a_ring_is_refused_without_a_gpu(model_dirs: dict[str, str]) -> None:
    parallel = {"context_parallel_size": 2, "context_attention": "ring"}
    with pytest.raises(RankError, match="parallel.context_attention: ring uses Transformer Engine and needs"):
        world(2).run(context_ranks.build, model_dirs["llama-deep-tied"], parallel=parallel)
