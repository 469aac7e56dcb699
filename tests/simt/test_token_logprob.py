"""token_logprob's CUDA kernels in the SIMT executor against a float64 reference."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import megarl.ops  # noqa: F401  registers the CPU kernels
from tests.simt.executor import Kernels, Read, SimtError, Write, stored, widened

# Of the sums relative to their own size; bfloat16 and float16 are compared on the rounded logits.
STATS_TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-6, "float16": 4e-6, "float64": 1e-13}
# Of the gradient relative to the row's largest: rounding to the type of the logits.
GRAD_TOLERANCE = {"float32": 4e-6, "bfloat16": 2**-8, "float16": 2**-10, "float64": 1e-13}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("token_logprob_simt.cpp")


def acc(dtype: str) -> type:
    return np.float64 if dtype == "float64" else np.float32


@dataclass
class Case:
    """One call. ``logits`` [T, stride] holds rows of ``columns`` values from column ``offset`` on."""

    rows: int
    columns: int
    dtype: str = "float32"
    padding: int = 0
    offset: int = 0
    vocab_start: int = 0
    per_row_temperature: bool = False
    indexed: bool = False
    masked: bool = False
    num_splits: int = 1
    grid: int = 3
    scale: float = 3.0
    seed: int = 0
    logits: np.ndarray = field(init=False)  # float64 [T, columns], the values as stored
    view: np.ndarray = field(init=False)
    buffer: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.rows, self.columns])
        total = self.rows + 2 if self.indexed else self.rows
        values = rng.normal(size=(total, self.columns)) * self.scale
        self.row_index = rng.permutation(total)[: self.rows].astype(np.int64) if self.indexed else None
        num_temperatures = self.rows if self.per_row_temperature else 1
        self.temperature = rng.uniform(0.3, 2.0, num_temperatures).astype(np.float32)
        # From below to beyond the shard: some targets belong to others.
        low, high = self.vocab_start - 3, self.vocab_start + self.columns + 3
        self.targets = rng.integers(low, high, self.rows)
        borders = [self.vocab_start - 1, self.vocab_start, high - 4, high - 3]
        self.targets[: len(borders)] = borders[: self.rows]
        self.set_logits(values)
        self.min_logit = None
        if self.masked:
            self.min_logit = np.quantile(self.selected(), 0.6, axis=1).astype(acc(self.dtype))

    def set_logits(self, values: np.ndarray) -> None:
        self.view = stored(values, self.dtype, padding=self.padding, offset=self.offset)
        assert self.view.base is not None
        self.buffer = self.view.base
        self.logits = widened(self.view)

    def selected(self) -> np.ndarray:
        return self.logits if self.row_index is None else self.logits[self.row_index]

    def arguments(self, writable: bool) -> list:
        wrap = Write if writable else Read
        stride = self.buffer.shape[1]
        return [
            *(wrap(self.view, "logits"), stride, len(self.buffer), self.columns, self.rows),
            *(Read(self.targets, "targets"), self.vocab_start),
            *(Read(self.temperature, "temperature"), len(self.temperature)),
            None if self.row_index is None else Read(self.row_index, "row_index"),
            None if self.min_logit is None else Read(self.min_logit, "min_logit"),
            *(self.num_splits, self.grid),
        ]

    def forward(self, kernels: Kernels) -> np.ndarray:
        stats = np.full((self.rows, 4), np.nan, acc(self.dtype))
        partial = np.full((self.rows, self.num_splits, 3), np.nan, acc(self.dtype))
        arguments = self.arguments(writable=False)
        kernels.run(
            f"token_logprob_{self.dtype}",
            *arguments,
            Write(stats, "stats"),
            Write(partial, "partial"),
            seed=self.seed,
        )
        return stats

    def backward(self, kernels: Kernels, row_max: np.ndarray, grad_stats: np.ndarray) -> np.ndarray:
        row_max, grad_stats = row_max.astype(acc(self.dtype)), grad_stats.astype(acc(self.dtype))
        arguments = self.arguments(writable=True)
        kernels.run(
            f"token_logprob_backward_{self.dtype}",
            *arguments,
            Read(row_max, "row_max"),
            Read(grad_stats, "grad_stats"),
            seed=self.seed,
        )
        return widened(self.view)

    def supported(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scaled d [R, V] with -inf outside the support, the maximum [R], and where the target is [R, V]."""
        x = self.selected()
        is_target = np.arange(self.columns) + self.vocab_start == self.targets[:, None]
        if self.min_logit is not None:
            x = np.where((x < self.min_logit[:, None].astype(np.float64)) & ~is_target, -np.inf, x)
        maximum = x.max(axis=1)
        shift = np.where(np.isneginf(maximum), 0, maximum)
        return (x - shift[:, None]) / self.temperature.astype(np.float64)[:, None], maximum, is_target

    def expected_stats(self) -> np.ndarray:
        d, maximum, is_target = self.supported()
        e = np.exp(d)
        target = np.where(is_target.any(1), np.where(is_target, self.selected(), 0).sum(1), -np.inf)
        return np.stack([maximum, e.sum(1), target, (np.where(e > 0, d, 0) * e).sum(1)], axis=1)

    def expected_gradient(self, grad_stats: np.ndarray) -> np.ndarray:
        d, _, is_target = self.supported()
        e, finite = np.exp(d), np.where(np.isneginf(d), 0, d)
        gradient = e * (grad_stats[:, 1:2] + grad_stats[:, 3:4] * (1 + finite))
        return gradient / self.temperature.astype(np.float64)[:, None] + is_target * grad_stats[:, 2:3]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal infinities, and finite values within tolerance of each row's largest."""
    expected = np.asarray(expected, np.float64)
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    scale = np.abs(np.where(infinite, 0, expected)).max(axis=1, keepdims=True, initial=1e-30)
    error = np.abs(np.where(infinite, 0, actual) - np.where(infinite, 0, expected)) / scale
    assert error.max(initial=0) <= tolerance, (
        f"relative error {error.max():.3g} at {np.unravel_index(error.argmax(), error.shape)}"
    )


def check(kernels: Kernels, case: Case) -> None:
    tolerance = STATS_TOLERANCE[case.dtype]
    stats = case.forward(kernels)
    expected = case.expected_stats()
    np.testing.assert_array_equal(stats[:, [0, 2]], expected[:, [0, 2]].astype(stats.dtype))
    assert_close(stats[:, [1]], expected[:, [1]], tolerance)
    assert_close(stats[:, [1, 3]], expected[:, [1, 3]], tolerance)  # cancellation is relative to the larger
    size = case.buffer.itemsize
    needed = case.rows * case.columns * size
    read, written = kernels.traffic("logits")
    assert needed <= read <= needed + 2 * case.rows * size, (
        "each logit is read once, and the target once more"
    )
    assert written == 0

    grad_stats = np.random.default_rng(case.seed).normal(size=(case.rows, 4))
    untouched = case.buffer.copy()
    gradient = case.backward(kernels, stats[:, 0], grad_stats)
    read, written = kernels.traffic("logits")
    assert needed <= written <= needed + case.rows * size
    assert needed <= read <= needed + case.rows * size
    selected = gradient if case.row_index is None else gradient[case.row_index]
    assert_close(selected, case.expected_gradient(grad_stats), GRAD_TOLERANCE[case.dtype])
    outside = np.ones(case.buffer.shape, bool)
    rows = slice(None) if case.row_index is None else case.row_index
    outside[rows, case.offset : case.offset + case.columns] = False
    np.testing.assert_array_equal(case.buffer[outside], untouched[outside])


DTYPES = ["float32", "bfloat16", "float16", "float64"]
# Below one vector, around the vectors in flight of a block (256 threads x 4 vectors), and beyond.
COLUMNS = [1, 3, 7, 8, 9, 255, 1000, 4096, 8191, 8192, 8200, 16411]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_vocabulary_sizes(kernels: Kernels, columns: int, dtype: str) -> None:
    check(kernels, Case(rows=4, columns=columns, dtype=dtype, seed=columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "offset"), [(1, 0), (0, 1), (5, 3), (8, 0), (6, 2)])
def test_strides_and_misaligned_rows(kernels: Kernels, padding: int, offset: int, dtype: str) -> None:
    check(kernels, Case(rows=5, columns=1003, dtype=dtype, padding=padding, offset=offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_splits"), [(0, 1), (1, 1), (2, 2), (11, 1), (1, 5), (11, 5)])
def test_rows_over_a_persistent_grid(kernels: Kernels, rows: int, num_splits: int, dtype: str) -> None:
    check(
        kernels,
        Case(rows, 2500, dtype, num_splits=num_splits, per_row_temperature=True, padding=1, seed=rows),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_index_mask_and_shard(kernels: Kernels, dtype: str) -> None:
    for masked in (False, True):
        case = Case(
            6, 777, dtype, indexed=True, masked=masked, vocab_start=1500, per_row_temperature=True, offset=1
        )
        check(kernels, case)
        check(kernels, Case(6, 5000, dtype, indexed=True, masked=masked, vocab_start=10, num_splits=3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_splits", [1, 16])
def test_largest_vocabulary(kernels: Kernels, dtype: str, num_splits: int) -> None:
    check(kernels, Case(3, 262_144, dtype, num_splits=num_splits, grid=7, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity(kernels: Kernels, dtype: str) -> None:
    for columns, num_splits in ((40, 1), (9000, 1), (9000, 4)):
        case = Case(5, columns, dtype, num_splits=num_splits)
        values = case.logits.copy()
        values[0, : columns // 2] = -np.inf
        values[1, 1:] = -np.inf
        values[2, :-1] = -np.inf
        values[3, :] = -np.inf  # a shard that holds nothing of the support
        values[4, ::2] = -np.inf
        case.set_logits(values)
        case.targets[:] = [columns - 1, 0, columns + 2, columns + 2, 1]
        check(kernels, case)


def on_cpu(case: Case, grad_stats: np.ndarray | None = None) -> np.ndarray:
    """The CPU kernel's statistics of a case, or the gradient [T, columns] it puts in place of the logits."""
    logits = torch.from_numpy(case.logits).to(getattr(torch, case.dtype))
    row_index = None if case.row_index is None else torch.from_numpy(case.row_index)
    min_logit = None if case.min_logit is None else torch.from_numpy(case.min_logit)
    rest = (torch.from_numpy(case.targets), torch.from_numpy(case.temperature), case.vocab_start)
    stats = torch.ops.megarl.token_logprob(logits, *rest, row_index, min_logit, True)
    if grad_stats is None:
        return stats.double().numpy()
    torch.ops.megarl.token_logprob_backward_(
        logits, *rest, row_index, min_logit, stats[:, 0], torch.from_numpy(grad_stats).to(stats.dtype)
    )
    return logits.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("columns", "num_splits"), [(40, 1), (9001, 4)])
def test_shard_without_any_finite_logit(
    kernels: Kernels, columns: int, num_splits: int, masked: bool, dtype: str
) -> None:
    """Maximum -inf, sums 0, gradient 0 except what the target's own logit gets: on every device alike."""
    case = Case(4, columns, dtype, num_splits=num_splits, vocab_start=100, padding=3, offset=1)
    values = np.full((4, columns), -np.inf)
    values[3] = case.logits[3]  # beside an ordinary row
    case.set_logits(values)
    if masked:
        case.min_logit = np.array([0.5, -np.inf, np.inf, -2.0], acc(dtype))
    case.targets[:] = [50, 100, 99 + columns, 100 + columns // 2]  # another shard's, first, last, middle
    expected = case.expected_stats()
    np.testing.assert_array_equal(expected[:3], np.tile([-np.inf, 0, -np.inf, 0], (3, 1)))
    theirs = on_cpu(case)
    check_stats = case.forward(kernels)
    np.testing.assert_array_equal(check_stats[:3], expected[:3])
    np.testing.assert_array_equal(theirs[:3], expected[:3])
    assert_close(theirs[:, [1, 3]], expected[:, [1, 3]], STATS_TOLERANCE[dtype])

    grad_stats = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    exact = case.expected_gradient(grad_stats)
    by_cpu = on_cpu(case, grad_stats)
    ours = case.backward(kernels, check_stats[:, 0], grad_stats)
    for gradient in (ours, by_cpu):
        assert_close(gradient, exact, GRAD_TOLERANCE[dtype])
        assert np.count_nonzero(gradient[0]) == 0
        assert np.count_nonzero(gradient[1]) == np.count_nonzero(gradient[2]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_surface(kernels: Kernels, dtype: str, bad: float) -> None:
    for column in (0, 500, 1002):
        case = Case(2, 1003, dtype, num_splits=2)
        values = case.logits.copy()
        values[1, column] = bad
        case.set_logits(values)
        stats = case.forward(kernels)
        assert np.isnan(stats[1, [1, 3]]).all()
        assert np.isfinite(stats[0, [1, 3]]).all()


def test_large_logits_and_low_temperature(kernels: Kernels) -> None:
    case = Case(4, 3000, scale=40.0, seed=3)
    case.set_logits(case.logits + 2000.0)
    case.temperature[:] = 0.05
    check(kernels, case)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_results_do_not_depend_on_thread_order_or_grid(kernels: Kernels, num_splits: int) -> None:
    results = []
    for seed, grid in ((1, 1), (2, 4), (3, 9)):
        case = Case(7, 5001, num_splits=num_splits, seed=0, grid=grid)
        case.seed = seed
        results.append(case.forward(kernels))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_shards_combine_to_the_whole(kernels: Kernels) -> None:
    whole = Case(6, 4001, seed=5)
    logits, expected = whole.logits, whole.expected_stats()
    parts = []
    for begin, end in ((0, 1001), (1001, 1002), (1002, 4001)):
        case = Case(6, end - begin, vocab_start=begin)
        case.set_logits(logits[:, begin:end])
        case.targets, case.temperature = whole.targets, whole.temperature
        parts.append(case.forward(kernels).astype(np.float64))
    shards = np.stack(parts)  # [3, 6, 4]
    maximum = shards[:, :, 0].max(0)
    d = (shards[:, :, 0] - maximum) / whole.temperature[0]
    total = (np.exp(d) * shards[:, :, 1]).sum(0)
    weighted = (np.exp(d) * (shards[:, :, 3] + d * shards[:, :, 1])).sum(0)
    actual = np.stack([maximum, total, shards[:, :, 2].max(0), weighted], axis=1)
    assert_close(actual[:, [1]], expected[:, [1]], 4e-6)
    assert_close(actual[:, [1, 3]], expected[:, [1, 3]], 4e-6)
    np.testing.assert_array_equal(actual[:, [0, 2]], expected[:, [0, 2]].astype(np.float32))


def test_index_outside_the_rows_stops_the_kernel(kernels: Kernels) -> None:
    for bad in (-1, 8):
        case = Case(6, 100, indexed=True)
        case.row_index[4] = bad
        with pytest.raises(SimtError, match="row_index is outside the rows of logits"):
            case.forward(kernels)


def test_offsets_beyond_32_bits(kernels: Kernels) -> None:
    """Three rows 2^31 elements apart: no index may pass through an int."""
    stride = 2**31 + 5
    no_reserve = 0x4000  # MAP_NORESERVE of Linux: only the touched pages are ever there
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, (2 * stride + 64) * 2, flags=flags)
    case = Case(3, 64, "bfloat16")
    sparse = np.frombuffer(memory, np.uint16)
    spread = np.lib.stride_tricks.as_strided(sparse, (3, 64), (stride * 2, 2))
    spread[:] = case.buffer
    stats = np.zeros((3, 4), np.float32)
    arguments = case.arguments(writable=False)
    arguments[0], arguments[1] = Read(spread, "logits"), stride
    kernels.run("token_logprob_bfloat16", *arguments, Write(stats), None)
    assert_close(stats[:, [1, 3]], case.expected_stats()[:, [1, 3]], 4e-6)


def test_split_plan_keeps_the_device_busy(kernels: Kernels) -> None:
    plan = kernels._library.token_logprob_plan_splits
    slots = 132 * 4
    for rows in (1, 7, 100, 529, 600, 1000, 5000, 100_000):
        splits = plan(rows, 151_936, slots, 8192)
        items = rows * splits
        assert items / (-(-items // slots) * slots) >= 0.88 or splits == 151_936 // 16_384
    assert plan(10_000, 1000, slots, 8192) == 1
