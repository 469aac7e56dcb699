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


class Ragged:
    """Random sequences of the given lengths, end to end."""

    def __init__(self, lengths: list[int]) -> None:
        rng = np.random.default_rng(7)
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        n = int(self.offsets[-1])
        self.token_ids = rng.integers(0, 50_000, n)
        self.loss_mask = rng.integers(0, 2, n).astype(np.uint8)
        self.advantages = rng.normal(size=len(lengths)).astype(np.float32)
        self.logprobs = rng.normal(size=n).astype(np.float32)

    def pad(self, indices: list[int], cp_size: int) -> np.ndarray:
        multiple = 1 if cp_size == 1 else 2 * cp_size
        padded = [-(-max(self.lengths[i] if i >= 0 else 0, 1) // multiple) * multiple for i in indices]
        return np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)

    def expected(
        self, indices: list[int], cu: np.ndarray, cp_rank: int, cp_size: int
    ) -> dict[str, np.ndarray]:
        rows: list[tuple] = []
        for s, index in enumerate(indices):
            padded = int(cu[s + 1] - cu[s])
            chunk = padded // (2 * cp_size)
            mine = [*range(cp_rank * chunk, (cp_rank + 1) * chunk)]
            mine += range((2 * cp_size - 1 - cp_rank) * chunk, (2 * cp_size - cp_rank) * chunk)
            for position in range(padded) if cp_size == 1 else mine:
                rows.append(self._position(index, position))
        columns = zip(*rows, strict=True) if rows else [[]] * len(FIELDS)
        return {name: np.array(column) for name, column in zip(FIELDS, columns, strict=True)}

    def _position(self, index: int, position: int) -> tuple:
        length = self.lengths[index] if index >= 0 else 0
        at = int(self.offsets[max(index, 0)]) + position
        token = self.token_ids[at] if position < length else 0
        label, mask, advantage, logprob = 0, 0.0, 0.0, 0.0
        if position + 1 < length:
            label, mask = self.token_ids[at + 1], float(self.loss_mask[at + 1])
            advantage, logprob = mask * self.advantages[index], mask * self.logprobs[at + 1]
        return token, label, mask, position, max(index, 0), advantage, logprob


def pack(
    kernels: Kernels,
    ragged: Ragged,
    indices: list[int],
    cu: np.ndarray,
    cp_rank: int,
    cp_size: int,
    with_logprobs: bool,
) -> dict[str, np.ndarray]:
    num_tokens = int(cu[-1]) // cp_size
    out = {name: np.full(num_tokens, -7, np.int64 if name in INTEGER else np.float32) for name in FIELDS}
    for name in FIELDS:  # 16-byte aligned, as torch allocates
        raw = np.empty(num_tokens * 8 + 16, np.uint8)
        skip = -raw.ctypes.data % 16
        out[name] = raw[skip : skip + num_tokens * out[name].itemsize].view(out[name].dtype)
    kernels.run(
        "pack",
        *(Read(ragged.token_ids, "ids"), Read(ragged.loss_mask, "mask"), Read(ragged.offsets, "offsets")),
        *(
            Read(ragged.advantages, "advantages"),
            Read(ragged.logprobs, "logprobs") if with_logprobs else None,
        ),
        *(len(ragged.lengths), len(ragged.token_ids)),
        *(
            Read(np.array(indices, np.int64), "indices"),
            Read(cu, "cu"),
            len(indices),
            num_tokens,
            cp_rank,
            cp_size,
        ),
        *(Write(out[name], f"out_{name}") for name in FIELDS[:-1]),
        Write(out["logprobs"], "out_logprobs") if with_logprobs else None,
        seed=num_tokens,
    )
    return out if with_logprobs else {name: out[name] for name in FIELDS[:-1]}


@pytest.mark.parametrize("with_logprobs", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[1], [5, 3], [1, 1, 1, 2, 1], [100, 257, 511, 512, 3, 700], [3000]],
    ids=lambda v: f"{len(v)}x{max(v)}",
)
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_pack(kernels: Kernels, lengths: list[int], cp_size: int, with_logprobs: bool) -> None:
    ragged = Ragged(lengths)
    indices = [*np.random.default_rng(1).permutation(len(lengths)).tolist(), -1]
    cu = ragged.pad(indices, cp_size)
    for cp_rank in range(cp_size):
        actual = pack(kernels, ragged, indices, cu, cp_rank, cp_size, with_logprobs)
        expected = ragged.expected(indices, cu, cp_rank, cp_size)
        for name, values in actual.items():
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
    ("indices", "cu", "cp_size", "message"),
    [
        ([0, 2], [0, 5, 8], 1, "indices is outside"),
        ([0, 1], [0, 4, 8], 1, "fewer positions than it has tokens"),
        ([0, 1], [0, 6, 12], 2, "no multiple of 2"),
        ([0, 1], [1, 6, 12], 1, "begin with 0"),
    ],
)
def test_wrong_plan_stops_the_kernel(
    kernels: Kernels, indices: list[int], cu: list[int], cp_size: int, message: str
) -> None:
    with pytest.raises(SimtError, match=message):
        pack(kernels, Ragged([5, 3]), indices, np.array(cu, np.int32), 0, cp_size, True)
