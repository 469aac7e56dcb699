"""vocab_kl's CUDA kernels in the SIMT executor against a float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.simt.executor import Kernels, Read, Write, stored, widened

DTYPES = ["float32", "bfloat16", "float16", "float64"]
# Relative to the row's largest sum of absolute terms; inputs are compared as stored.
STATS_TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-6, "float16": 4e-6, "float64": 1e-12}
GRAD_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10, "float64": 1e-12}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("vocab_kl_simt.cpp")


def softmax_parts(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(d), and log-sum-exp [R, 1]."""
    e = np.exp(d)
    return e, np.log(e.sum(1, keepdims=True))


def times(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """weight * value, 0 where the weight is 0 whatever the value."""
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, 0.0, weight * value)


@dataclass
class Case:
    """Student and teacher rows of ``columns`` logits."""

    rows: int
    columns: int
    dtype: str = "float32"
    num_splits: int = 1
    grid: int = 3
    student_offset: int = 0
    teacher_offset: int = 0
    padding: int = 0
    per_row_temperature: bool = False
    seed: int = 0
    student: np.ndarray = field(init=False)
    teacher: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.rows, self.columns])
        base = rng.normal(size=(self.rows, self.columns)) * 2
        self.set_logits(base, base + rng.normal(size=base.shape))
        count = self.rows if self.per_row_temperature else 1
        self.temperature = rng.uniform(0.4, 1.5, count).astype(np.float32)
        self.acc = np.float64 if self.dtype == "float64" else np.float32

    def set_logits(self, student: np.ndarray, teacher: np.ndarray) -> None:
        self.student = stored(student, self.dtype, offset=self.student_offset, padding=self.padding)
        self.teacher = stored(teacher, self.dtype, offset=self.teacher_offset)

    def run(self, kernels: Kernels, name: str, *rest: Read | Write | float, write: bool = False) -> None:
        strides = [a.strides[0] // a.itemsize for a in (self.student, self.teacher)]
        student = Write(self.student, "student") if write else Read(self.student, "student")
        kernels.run(
            f"{name}_{self.dtype}",
            *(student, strides[0], Read(self.teacher, "teacher"), strides[1], self.columns, self.rows),
            *(Read(self.temperature), len(self.temperature), self.num_splits, self.grid),
            *rest,
            seed=self.seed,
        )

    def scaled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ds, dt, and both maxima [R, 1]; rows without a finite logit are shifted by 0."""
        heat = self.temperature.astype(np.float64)[:, None]
        parts = []
        for logits in (widened(self.student), widened(self.teacher)):
            maximum = logits.max(1, keepdims=True)
            parts.append(((logits - np.where(np.isinf(maximum), 0, maximum)) / heat, maximum))
        return parts[0][0], parts[1][0], parts[0][1], parts[1][1]

    def stats(self, kernels: Kernels) -> np.ndarray:
        stats = np.full((self.rows, 6), np.nan, self.acc)
        partial = np.full((self.rows, self.num_splits, 6), np.nan, self.acc)
        self.run(kernels, "vocab_kl", Write(stats, "stats"), Write(partial, "partial"))
        return stats


def assert_close(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray, tolerance: float) -> None:
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    error = np.abs(np.where(infinite, 0, actual) - np.where(infinite, 0, expected))
    worst = (error / np.maximum(scale, 1e-30)).max(initial=0)
    assert worst <= tolerance, f"relative error {worst:.3g}"


def check(kernels: Kernels, case: Case) -> None:
    ds, dt, student_max, teacher_max = case.scaled()
    p, q = np.exp(ds), np.exp(dt)
    with np.errstate(invalid="ignore"):
        gap = ds - dt
    expected = [
        student_max[:, 0],
        p.sum(1),
        teacher_max[:, 0],
        q.sum(1),
        times(p, gap).sum(1),
        times(q, -gap).sum(1),
    ]
    finite = np.where(np.isfinite(gap), np.abs(gap), 0)
    scale = np.stack([*expected[:4], (p * (finite + 1)).sum(1), (q * (finite + 1)).sum(1)], axis=1)
    stats = case.stats(kernels)
    np.testing.assert_array_equal(stats[:, [0, 2]], np.stack(expected, 1)[:, [0, 2]].astype(stats.dtype))
    assert_close(
        stats, np.stack(expected, 1), np.abs(np.where(np.isinf(scale), 0, scale)), STATS_TOLERANCE[case.dtype]
    )
    for name in ("student", "teacher"):
        assert kernels.traffic(name) == (case.rows * case.columns * case.student.itemsize, 0), "read once"

    grads = np.random.default_rng(case.seed).normal(size=(case.rows, 6)).astype(case.acc)
    if np.isinf(stats[:, 4]).any():
        grads[:, 4] = 0  # reverse KL is infinite there, so nobody differentiates it
    g = grads.astype(np.float64)
    weight = g[:, 1:2] + np.where(g[:, 4:5] == 0, 0, g[:, 4:5] * (1 + np.where(np.isfinite(gap), gap, 0)))
    gradient = (times(p, weight) - g[:, 5:6] * q) / case.temperature.astype(np.float64)[:, None]
    row_max = np.ascontiguousarray(stats[:, [0, 2]])
    case.run(kernels, "vocab_kl_backward", Read(row_max), Read(grads), write=True)
    magnitude = np.abs(gradient).max(1, keepdims=True)
    assert_close(widened(case.student), gradient, magnitude, GRAD_TOLERANCE[case.dtype])


def check_js(kernels: Kernels, case: Case, beta: float) -> None:
    ds, dt, _, _ = case.scaled()
    (p, student_lse), (q, teacher_lse) = softmax_parts(ds), softmax_parts(dt)
    p, q = p / np.exp(student_lse), q / np.exp(teacher_lse)
    mixture = (1 - beta) * p + beta * q
    with np.errstate(divide="ignore", invalid="ignore"):
        student_log, teacher_log = np.log(p / mixture), np.log(q / mixture)
    expected = np.stack([times(p, student_log).sum(1), times(q, teacher_log).sum(1)], axis=1)
    heat = case.temperature.astype(np.float64)[:, None]
    maxima = [widened(a).max(1, keepdims=True) / heat for a in (case.student, case.teacher)]
    lse = [
        Read((m + part)[:, 0].astype(case.acc))
        for m, part in zip(maxima, (student_lse, teacher_lse), strict=True)
    ]
    sums = np.full((case.rows, 2), np.nan, case.acc)
    partial = np.full((case.rows, case.num_splits, 2), np.nan, case.acc)
    case.run(kernels, "vocab_js", *lse, beta, Write(sums, "sums"), Write(partial, "partial"))
    tolerance = 1e-12 if case.dtype == "float64" else 2e-6
    np.testing.assert_allclose(sums, expected, rtol=tolerance, atol=tolerance)

    grad = np.random.default_rng(case.seed).normal(size=case.rows).astype(case.acc)
    inner = times(p, student_log - expected[:, :1])
    gradient = grad.astype(np.float64)[:, None] * (1 - beta) / heat * inner
    first = np.ascontiguousarray(sums[:, 0])
    case.run(kernels, "vocab_js_backward", *lse, beta, Read(first), Read(grad), write=True)
    # Where p and q agree the gradient vanishes, but the rounding of their logarithms does not.
    magnitude = np.maximum(np.abs(gradient).max(1, keepdims=True), 0.01 * np.abs(grad[:, None]) / heat)
    assert_close(widened(case.student), gradient, magnitude, max(GRAD_TOLERANCE[case.dtype], 10 * tolerance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 1000, 2048, 4099, 8200])
def test_vocabulary_sizes(kernels: Kernels, columns: int, dtype: str) -> None:
    check(kernels, Case(3, columns, dtype, seed=columns))
    check_js(kernels, Case(3, columns, dtype, seed=columns), beta=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("student_offset", "teacher_offset"), [(1, 1), (1, 0), (0, 3)])
def test_misaligned_rows(kernels: Kernels, student_offset: int, teacher_offset: int, dtype: str) -> None:
    for splits in (1, 3):
        arguments = {
            "student_offset": student_offset,
            "teacher_offset": teacher_offset,
            "padding": 2,
            "num_splits": splits,
        }
        check(kernels, Case(4, 1501, dtype, **arguments))
        check_js(kernels, Case(4, 1501, dtype, **arguments), beta=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_splits"), [(0, 1), (1, 1), (1, 6), (9, 1), (9, 4)])
def test_rows_over_a_persistent_grid(kernels: Kernels, rows: int, num_splits: int, dtype: str) -> None:
    if rows:
        check(kernels, Case(rows, 3000, dtype, num_splits, per_row_temperature=True))
        check_js(kernels, Case(rows, 3000, dtype, num_splits, per_row_temperature=True), beta=0.9)
    else:
        Case(rows, 3000, dtype).stats(kernels)


def test_largest_vocabulary(kernels: Kernels) -> None:
    check(kernels, Case(2, 262_144, "bfloat16", num_splits=8, grid=5))
    check_js(kernels, Case(2, 262_144, "bfloat16", num_splits=8, grid=5), beta=0.5)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity(kernels: Kernels, dtype: str, num_splits: int) -> None:
    def masked(student: list[slice], teacher: list[slice]) -> Case:
        case = Case(3, 6000, dtype, num_splits)
        logits = [widened(case.student).copy(), widened(case.teacher).copy()]
        for values, parts in zip(logits, (student, teacher), strict=True):
            for part in parts:
                values[1, part] = -np.inf
        case.set_logits(*logits)
        return case

    both = [slice(0, 2500), slice(5000, 5100)]
    check(kernels, masked(both, both))  # the same support
    check_js(kernels, masked(both, both), beta=0.5)
    check(kernels, masked([], [slice(0, 3000)]))  # KL(student || teacher) is infinite
    check_js(kernels, masked([], [slice(0, 3000)]), beta=0.5)
    check(kernels, masked([slice(10, 4000)], []))  # KL(teacher || student) is infinite
    check_js(kernels, masked([slice(10, 4000)], []), beta=0.5)
    check(kernels, masked([slice(None)], [slice(None)]))  # a shard outside both supports


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_surface(kernels: Kernels, bad: float) -> None:
    for which in (0, 1):
        case = Case(2, 1000, num_splits=2)
        logits = [widened(case.student).copy(), widened(case.teacher).copy()]
        logits[which][1, 700] = bad
        case.set_logits(*logits)
        stats = case.stats(kernels)
        assert np.isfinite(stats[0]).all()
        assert np.isnan(stats[1, 4:]).any()
        assert np.isnan(stats[1, 1 + 2 * which])


def test_equal_distributions_have_no_divergence(kernels: Kernels) -> None:
    case = Case(2, 50_000, seed=2)
    case.set_logits(widened(case.teacher), widened(case.teacher))
    assert np.abs(case.stats(kernels)[:, 4:]).max() == 0
    check_js(kernels, case, beta=0.5)


def test_results_do_not_depend_on_thread_order_or_grid(kernels: Kernels) -> None:
    results = []
    for seed, grid in ((1, 1), (2, 5)):
        case = Case(5, 5001, num_splits=3, grid=grid)
        case.seed = seed
        results.append(case.stats(kernels))
    np.testing.assert_array_equal(results[0], results[1])
