"""The SIMT executor itself: correct kernels give correct results, and every planted bug is reported."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.simt.executor import Kernels, Read, SimtError, Write, from_bfloat16, to_bfloat16


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("executor_cases.cpp")


@pytest.mark.parametrize("seed", range(3))
def test_block_sum(kernels: Kernels, seed: int) -> None:
    x = np.arange(1000, dtype=np.float32)
    total = np.zeros(1, np.float32)
    kernels.run("block_sum_case", Read(x, "x"), Write(total, "total"), 1000, 3, seed=seed)
    assert total[0] == x.sum()
    assert kernels.traffic("x") == (4000, 0)


def test_warp_operations_match_their_definitions(kernels: Kernels) -> None:
    out = np.zeros((11, 32), np.int32)
    kernels.run("warp_operations_case", Write(out))
    lane = np.arange(32)
    expected = [
        lane // 8 * 8 + (lane + 3) % 8,
        np.where(lane % 16 < 2, lane, lane - 2),
        np.where(lane + 5 > 31, lane, lane + 5),
        lane ^ 9,
        np.full(32, sum(1 << k for k in range(0, 32, 3)), np.uint32).view(np.int32),
        np.full(32, 1),
        np.full(32, 31 * 16),
        np.full(32, -31),
        np.full(32, -1),
        np.full(32, 5),
        np.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    np.testing.assert_array_equal(out, np.stack(expected))


def test_vector_copy_counts_bytes(kernels: Kernels) -> None:
    x = np.random.default_rng(0).normal(size=1024).astype(np.float32)
    y = np.zeros_like(x)
    kernels.run("vector_copy_case", Read(x, "x"), Write(y, "y"), x.size)
    np.testing.assert_array_equal(x, y)
    assert kernels.traffic("x") == (4096, 0)
    assert kernels.traffic("y") == (0, 4096)


@pytest.mark.parametrize("seed", range(5))
def test_last_block_reduces(kernels: Kernels, seed: int) -> None:
    x = np.arange(5, dtype=np.float32)
    partial, counter, total = np.zeros(5, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    kernels.run("last_block_case", Read(x), Write(partial), Write(counter), Write(total), seed=seed)
    assert total[0] == 10.0


def test_dynamic_shared_memory(kernels: Kernels) -> None:
    x = np.arange(64, dtype=np.float32)
    y = np.zeros_like(x)
    kernels.run("dynamic_reverse_case", Read(x), Write(y))
    np.testing.assert_array_equal(y, x[::-1])


def test_seed_decides_the_order_of_threads(kernels: Kernels) -> None:
    def order(seed: int) -> list[int]:
        threads, count = np.zeros(80, np.int32), np.zeros(1, np.int32)
        kernels.run("order_of_threads_case", Write(threads), Write(count), seed=seed)
        assert sorted(threads) == list(range(80))
        return threads.tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


BUGS = {
    "bug_read_past_end": (1, 5, r"out of bounds: read of 4 bytes at byte 256 of buffer x \(256 bytes\)"),
    "bug_write_before_start": (1, 5, r"out of bounds: write of 4 bytes at byte -4 of buffer y"),
    "bug_write_input": (1, 5, r"write at byte 0 of read-only buffer x"),
    "bug_vector_past_end": (1, 5, r"(misaligned read of 16|out of bounds: read of 16) bytes"),
    "bug_misaligned_load": (1, 5, r"misaligned"),
    "bug_misaligned_ldg": (1, 5, r"misaligned read of 16 bytes"),
    "bug_shared_out_of_bounds": (
        1,
        5,
        r"out of bounds: write of 4 bytes at byte 32 of shared variable buffer",
    ),
    "bug_dynamic_shared_out_of_bounds": (
        1,
        5,
        r"out of bounds: write of 4 bytes at byte 276 of shared variable \(dynamic\)",
    ),
    "bug_shared_unwritten": (1, 5, r"read of unwritten byte 20 of shared variable buffer"),
    "bug_missing_barrier": (None, None, r"(data race|unwritten byte).* of shared variable buffer"),
    "bug_missing_second_barrier": (None, None, r"data race: .* of byte \d+ of shared variable buffer"),
    "bug_warp_sync_across_warps": (None, None, r"(data race|unwritten byte).* of shared variable buffer"),
    "bug_barrier_in_branch": (1, None, r"divergent barrier: .*thread \(5,0,0\) has exited"),
    "bug_two_barriers": (1, None, r"divergent barrier: .*thread \(5,0,0\) is at __syncthreads"),
    "bug_shuffle_exited_lane": (1, None, r"names lane 5, which has exited"),
    "bug_shuffle_absent_lane": (None, None, r"names lane 8, which the block does not have"),
    "bug_mask_without_caller": (1, 5, r"leaves out the calling lane 5"),
    "bug_masks_differ": (1, None, r"divergent warp: .*0x000000ff"),
    "bug_shuffle_source_not_named": (1, 5, r"reads lane 20, which its mask 0x0000ffff does not name"),
    "bug_shuffle_in_branch": (
        1,
        None,
        r"divergent warp: waits at vote .* for thread \(5,0,0\), which is at __syncthreads",
    ),
    "bug_local_array": (1, 5, r"index 4 is out of bounds of its array"),
    "bug_int_overflow": (1, None, r"signed overflow in \*"),
    "bug_other_threads_stack": (1, 5, r"out of bounds: read of 4 bytes"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_named(kernels: Kernels, bug: str, seed: int) -> None:
    block, thread, message = BUGS[bug]
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    with pytest.raises(SimtError) as caught:
        kernels.run(f"{bug}_case", Read(x, "x"), Write(y, "y"), 64, seed=seed)
    text = str(caught.value)
    place = re.match(rf"kernel {bug}, block \((\d+),0,0\), thread \((\d+),0,0\): ", text)
    assert place, text
    assert re.search(message, text), text
    assert block is None or int(place[1]) == block, text
    assert thread is None or int(place[2]) == thread, text


@pytest.mark.parametrize("seed", range(3))
def test_warp_sync_orders_one_warp(kernels: Kernels, seed: int) -> None:
    y = np.zeros(64, np.float32)
    kernels.run("right_warp_sync_case", None, Write(y), 0, seed=seed)
    np.testing.assert_array_equal(y, np.arange(64) ^ 31)


def test_works_after_an_error(kernels: Kernels) -> None:
    y = np.zeros(64, np.float32)
    with pytest.raises(SimtError):
        kernels.run("bug_write_before_start_case", None, Write(y), 0)
    test_dynamic_shared_memory(kernels)


def test_narrow_types_round_as_numpy(kernels: Kernels) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 6e-8, 2.9e-8, 1e-30, 1e-41], np.float32
    )
    x = np.concatenate([bits.view(np.float32), np.linspace(-7e-5, 7e-5, 5001, dtype=np.float32), special])
    x = x[~np.isnan(x)]
    narrow, back = np.zeros(x.size, np.uint16), np.zeros_like(x)
    kernels.run("convert_half", Read(x), Write(narrow), Write(back), x.size)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    np.testing.assert_array_equal(narrow, half.view(np.uint16))
    np.testing.assert_array_equal(back, half.astype(np.float32))
    kernels.run("convert_bfloat16", Read(x), Write(narrow), Write(back), x.size)
    np.testing.assert_array_equal(narrow, to_bfloat16(x))
    np.testing.assert_array_equal(back, from_bfloat16(narrow))
