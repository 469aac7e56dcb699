"""The native planner and pack kernel against their references in Python and torch, and edge cases."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from megarl import _C
from megarl.batching import context_parallel_slice
from megarl.batching.pack import Packer
from megarl.ops.pack import PackedRows, RaggedTokens, pack_sequences, unpack_values
from megarl.records import TokenSequence, TrainBatch
from tests.oracles.packing import pack_sequences_reference, plan_reference


def native_plan(lengths: list[int], **arguments: object) -> list[list[list[int]]]:
    indices, offsets, counts = _C.plan_microbatches(np.array(lengths, dtype=np.int64), **arguments)  # type: ignore[arg-type]
    microbatches = [indices[i:j].tolist() for i, j in pairwise(offsets)]
    ends = np.concatenate([[0], counts.cumsum()])
    return [microbatches[i:j] for i, j in pairwise(ends)]


def test_native_plans_equal_the_reference() -> None:
    rng = random.Random(0)
    for _ in range(60):
        budget = rng.choice([1, 7, 64, 1000, 4096, 100_000])
        n = rng.choice([0, 1, 2, 5, 17, 100, 400])
        mu, sigma = rng.uniform(0, 7), rng.choice([0.2, 0.9, 2.0])
        lengths = [min(budget, max(1, int(rng.lognormvariate(mu, sigma)))) for _ in range(n)]
        equal = rng.random() < 0.7
        arguments = {
            "max_tokens": budget,
            "num_ranks": rng.choice([1, 2, 3, 8]),
            "group": rng.choice([1, 2, 4]) if equal else 1,
            "equal_counts": equal,
            "a": rng.choice([1.0, 0.0, 0.3]),
            "b": rng.choice([1.0, 1 / 6912, 1 / 3]),
        }
        assert native_plan(lengths, **arguments) == plan_reference(lengths, **arguments), (n, arguments)  # type: ignore[arg-type]


def test_native_plans_equal_the_reference_beyond_the_fill() -> None:
    """More sequences than the balanced fill handles; lengths few and sparse."""
    rng = random.Random(1)
    lengths = [min(4096, max(1, int(rng.lognormvariate(5.5, 1.0)))) for _ in range(66_000)]
    arguments = {"max_tokens": 4096, "num_ranks": 8, "group": 2, "equal_counts": True, "a": 1.0, "b": 1e-4}
    assert native_plan(lengths, **arguments) == plan_reference(lengths, **arguments)  # type: ignore[arg-type]
    sparse = [rng.randint(1, 3_000_000) for _ in range(50)]
    arguments |= {"max_tokens": 4_000_000, "num_ranks": 3}
    assert native_plan(sparse, **arguments) == plan_reference(sparse, **arguments)  # type: ignore[arg-type]


def test_a_million_sequences_pack_tightly_and_evenly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.0, 0.9, 1_000_000).astype(np.int64).clip(1, 4096)
    indices, offsets, counts = _C.plan_microbatches(
        lengths, max_tokens=4096, num_ranks=8, group=1, equal_counts=True, a=1.0, b=1 / 24_576
    )
    assert np.array_equal(np.sort(indices), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[indices], offsets[:-1]).max() <= 4096
    assert len(offsets) - 1 <= 1.01 * lengths.sum() / 4096
    costs = (lengths + lengths**2 / 24_576)[indices]
    per_rank = np.add.reduceat(costs, offsets[np.concatenate([[0], counts.cumsum()[:-1]])])
    assert per_rank.max() / per_rank.mean() <= 1.001


def random_arguments(
    rng: random.Random, cp_size: int, logprobs: bool
) -> tuple[RaggedTokens, PackedRows, int]:
    lengths = [rng.choice([1, 1, 2, 3, 17, 100]) for _ in range(rng.randint(1, 12))]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    tokens = RaggedTokens(
        torch.randint(1, 10**6, (total,), generator=generator),
        torch.randint(0, 2, (total,), generator=generator).byte(),
        torch.randn(total, generator=generator) if logprobs else None,
    )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    chosen = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
    picked = [lengths[i] if rng.random() < 0.9 else 0 for i in chosen]
    padded = (
        [max(1, -(-n // (2 * cp_size))) * 2 * cp_size for n in picked]
        if cp_size > 1
        else [max(1, n) for n in picked]
    )
    cu_seqlens = [sum(padded[:i]) for i in range(len(padded) + 1)]
    rows = PackedRows(
        torch.tensor([starts[i] for i in chosen]),
        torch.tensor(picked, dtype=torch.int32),
        torch.tensor(chosen),
        torch.randn(len(chosen), generator=generator),
        torch.tensor(cu_seqlens, dtype=torch.int32),
    )
    return tokens, rows, cu_seqlens[-1] // cp_size


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("logprobs", [True, False])
def test_pack_kernel_equals_the_torch_reference(cp_size: int, logprobs: bool) -> None:
    rng = random.Random(cp_size)
    for _ in range(40):
        tokens, rows, num_tokens = random_arguments(rng, cp_size, logprobs)
        for cp_rank in range(cp_size):
            layout = {"num_tokens": num_tokens, "cp_rank": cp_rank, "cp_size": cp_size}
            found = pack_sequences(tokens, rows, **layout)
            expected = pack_sequences_reference(tokens, rows, **layout)
            for name, value in found._asdict().items():
                assert torch.equal(value, getattr(expected, name)), name
                assert value.dtype == getattr(expected, name).dtype, name


def test_many_threads_write_the_same_bytes() -> None:
    """Long sequences are cut between threads; the cut may fall anywhere."""
    lengths = [30_000, 1, 5, 12_345, 20_001]
    total = sum(lengths)
    tokens = RaggedTokens(
        torch.arange(1, total + 1), (torch.arange(total) % 3 == 0).byte(), torch.arange(total) / 7
    )
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    cu_seqlens = torch.tensor(
        [0, *torch.tensor([-(-n // 4) * 4 for n in lengths]).cumsum(0).tolist()], dtype=torch.int32
    )
    rows = PackedRows(
        starts, torch.tensor(lengths, dtype=torch.int32), torch.arange(5), torch.ones(5), cu_seqlens
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for cp_rank in (0, 1):
                layout = {"num_tokens": int(cu_seqlens[-1]) // 2, "cp_rank": cp_rank, "cp_size": 2}
                found = pack_sequences(tokens, rows, **layout)
                expected = pack_sequences_reference(tokens, rows, **layout)
                assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_packing_a_slice_equals_slicing_the_pack(cp_size: int) -> None:
    lengths = (1, 5, 12, 40)
    packer = Packer(
        TrainBatch.of(TokenSequence(list(range(1, n + 1)), [1] * n, [-0.5] * n) for n in lengths),
        advantages=np.array(lengths, dtype=float),
    )
    whole = packer.pack([3, 0, 2], pad_to_multiple=2 * cp_size)
    for rank in range(cp_size):
        sliced = context_parallel_slice(whole, rank, cp_size)
        packed = packer.pack([3, 0, 2], pad_to_multiple=2 * cp_size, cp_rank=rank, cp_size=cp_size)
        for name in (
            "token_ids",
            "labels",
            "loss_mask",
            "position_ids",
            "cu_seqlens",
            "sequence_ids",
            "advantages",
        ):
            assert torch.equal(getattr(sliced, name), getattr(packed, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_unpack_kernel_for_every_width(dtype: torch.dtype) -> None:
    values = torch.arange(10, 20).to(dtype)
    cu_seqlens = torch.tensor([0, 4, 8, 10], dtype=torch.int32)
    lengths = torch.tensor([3, 0, 1], dtype=torch.int32)
    found = unpack_values(values, cu_seqlens, lengths, torch.tensor([0, 3, 3]), 4)
    assert torch.equal(found, torch.tensor([0, 10, 11, 0]).to(dtype))


def test_wrong_arguments_are_named() -> None:
    tokens = RaggedTokens(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1], dtype=torch.uint8), None)
    rows = PackedRows(
        torch.tensor([0]),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0]),
        torch.ones(1),
        torch.tensor([0, 3], dtype=torch.int32),
    )
    with pytest.raises(
        ValueError, match="pack_sequences: sequence 0 of 3 tokens from 1 on is outside the 3 tokens"
    ):
        pack_sequences(tokens, rows._replace(starts=torch.tensor([1])), num_tokens=3)
    with pytest.raises(ValueError, match="sequence 0 has 3 tokens, cu_seqlens gives it 2"):
        pack_sequences(
            tokens, rows._replace(cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), num_tokens=2
        )
    with pytest.raises(ValueError, match="no multiple of 2 \\* cp_size = 4"):
        pack_sequences(tokens, rows, num_tokens=1, cp_size=2)
    with pytest.raises(ValueError, match="num_tokens must be 3, got 4"):
        pack_sequences(tokens, rows, num_tokens=4)
    with pytest.raises(ValueError, match="loss_mask must be Byte, got Float"):
        pack_sequences(tokens._replace(loss_mask=torch.ones(3)), rows, num_tokens=3)
    with pytest.raises(ValueError, match="unpack_values: lengths add up to 3, num_values is 4"):
        unpack_values(torch.zeros(3), rows.cu_seqlens, rows.lengths, rows.starts, 4)


def test_ops_keep_the_contracts_of_torch_library() -> None:
    rng = random.Random(5)
    tokens, rows, num_tokens = random_arguments(rng, 2, True)
    torch.library.opcheck(torch.ops.megarl.pack_sequences.default, (*tokens, *rows, num_tokens, 1, 2))
    lengths = rows.lengths
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.long().cumsum(0)[:-1]])
    values = torch.randn(int(rows.cu_seqlens[-1]))
    arguments = (values, rows.cu_seqlens, lengths, starts, int(lengths.sum()))
    torch.library.opcheck(torch.ops.megarl.unpack_values.default, arguments)
