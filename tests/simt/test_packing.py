"""The packing kernels in the SIMT executor against a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.executor import Kernels, Read, SimtError, Write

FIELDS = ("token_ids", "labels", "loss_mask", "position_ids", "sequence_ids", "advantages", "logprobs")
INTEGER = ("token_ids", "labels", "position_ids", "sequence_ids")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("packing_simt.cpp")


class Batch:
    """Sequences of the given lengths (0: a dummy), scattered over a larger store of tokens."""

    def __init__(self, lengths: list[int], cp_size: int) -> None:
        rng = np.random.default_rng(7)
        self.lengths = np.array(lengths, np.int32)
        gaps = rng.integers(0, 4, len(lengths))
        order = rng.permutation(len(lengths))
        self.starts = np.zeros(len(lengths), np.int64)
        self.starts[order] = np.cumsum((self.lengths + gaps)[order]) - self.lengths[order]
        n = int((self.lengths + gaps).sum())
        self.token_ids = rng.integers(0, 50_000, n)
        self.loss_mask = rng.integers(0, 2, n).astype(np.uint8)
        self.logprobs = rng.normal(size=n).astype(np.float32)
        self.rows = rng.integers(0, 1000, len(lengths))
        self.advantages = rng.normal(size=len(lengths)).astype(np.float32)
        self.cp_size = cp_size
        multiple = 1 if cp_size == 1 else 2 * cp_size
        padded = -(-np.maximum(self.lengths, 1) // multiple) * multiple
        self.cu = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)

    def expected(self, cp_rank: int) -> dict[str, np.ndarray]:
        positions: list[tuple] = []
        for s in range(len(self.lengths)):
            padded = int(self.cu[s + 1] - self.cu[s])
            chunk, last = padded // (2 * self.cp_size), 2 * self.cp_size - 1 - cp_rank
            mine = [*range(cp_rank * chunk, (cp_rank + 1) * chunk), *range(last * chunk, (last + 1) * chunk)]
            positions += [self._position(s, p) for p in (range(padded) if self.cp_size == 1 else mine)]
        return {
            name: np.array(column) for name, column in zip(FIELDS, zip(*positions, strict=True), strict=True)
        }

    def _position(self, s: int, position: int) -> tuple:
        at = int(self.starts[s]) + position
        token = self.token_ids[at] if position < self.lengths[s] else 0
        label, mask, advantage, logprob = 0, 0.0, 0.0, 0.0
        if position + 1 < self.lengths[s]:
            label, mask = self.token_ids[at + 1], float(self.loss_mask[at + 1])
            advantage, logprob = mask * self.advantages[s], mask * self.logprobs[at + 1]
        return token, label, mask, position, self.rows[s], advantage, logprob


def aligned(size: int, dtype: type) -> np.ndarray:
    """16-byte aligned, as torch allocates."""
    raw = np.empty(size * 8 + 16, np.uint8)
    skip = -raw.ctypes.data % 16
    return raw[skip : skip + size * np.dtype(dtype).itemsize].view(dtype)


def pack(kernels: Kernels, batch: Batch, cp_rank: int, with_logprobs: bool) -> dict[str, np.ndarray]:
    num_tokens = int(batch.cu[-1]) // batch.cp_size
    out = {name: aligned(num_tokens, np.int64 if name in INTEGER else np.float32) for name in FIELDS}
    kernels.run(
        "pack",
        *(Read(batch.token_ids, "token_ids"), Read(batch.loss_mask, "loss_mask")),
        *(Read(batch.logprobs, "logprobs") if with_logprobs else None, len(batch.token_ids)),
        *(Read(batch.starts, "starts"), Read(batch.lengths, "lengths"), Read(batch.rows, "rows")),
        *(Read(batch.advantages, "advantages"), Read(batch.cu, "cu"), len(batch.lengths)),
        *(num_tokens, cp_rank, batch.cp_size),
        *(Write(out[name], f"out_{name}") for name in FIELDS[:-1]),
        Write(out["logprobs"], "out_logprobs") if with_logprobs else None,
        seed=num_tokens,
    )
    return out if with_logprobs else {name: out[name] for name in FIELDS[:-1]}


LENGTHS = [[1], [0], [5, 3, 0], [1, 1, 1, 2, 1], [100, 257, 0, 511, 512, 3, 700], [3000]]


@pytest.mark.parametrize("with_logprobs", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: f"{len(v)}x{max(v)}")
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_pack(kernels: Kernels, lengths: list[int], cp_size: int, with_logprobs: bool) -> None:
    batch = Batch(lengths, cp_size)
    for cp_rank in range(cp_size):
        expected = batch.expected(cp_rank)
        for name, values in pack(kernels, batch, cp_rank, with_logprobs).items():
            np.testing.assert_array_equal(values, expected[name].astype(values.dtype), err_msg=name)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_unpack_inverts(kernels: Kernels, bits: int) -> None:
    lengths = np.array([4, 0, 1, 300, 257, 0, 2, 0], np.int32)
    padded = lengths + np.array([0, 2, 3, 0, 5, 0, 0, 4], np.int32)
    cu = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    values = np.random.default_rng(2).integers(1, 60_000, int(cu[-1])).astype(f"uint{bits}")
    expected = np.zeros(lengths.sum(), values.dtype)
    for s, length in enumerate(lengths):
        if length:
            expected[starts[s] + 1 : starts[s] + length] = values[cu[s] : cu[s] + length - 1]
    unpacked = np.full_like(expected, 9)
    kernels.run(
        f"unpack_{bits}",
        *(
            Read(values, "values"),
            len(values),
            Read(cu),
            Read(lengths),
            Read(starts),
            len(lengths),
            len(expected),
        ),
        Write(unpacked),
    )
    np.testing.assert_array_equal(unpacked, expected)


@pytest.mark.parametrize(
    ("change", "cp_size", "message"),
    [
        ({"starts": [0, 90]}, 1, "a sequence is outside token_ids"),
        ({"lengths": [5, -1]}, 1, "a sequence is outside token_ids"),
        ({"cu": [0, 4, 8]}, 1, "fewer positions than it has tokens"),
        ({"cu": [0, 6, 12]}, 2, "no multiple of 2"),
        ({"cu": [1, 6, 12]}, 1, "begin with 0"),
    ],
)
def test_wrong_plan_stops_the_kernel(kernels: Kernels, change: dict, cp_size: int, message: str) -> None:
    batch = Batch([5, 3], cp_size)
    for name, values in change.items():
        setattr(batch, name, np.array(values, getattr(batch, name).dtype))
    with pytest.raises(SimtError, match=message):
        pack(kernels, batch, 0, True)
