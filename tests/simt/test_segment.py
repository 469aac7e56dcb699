"""The segment kernels (reduce, GAE, group advantage) in the SIMT executor against float64 loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.simt.executor import Kernels, Read, SimtError, Write, stored, widened

LENGTHS = {  # around a tile of the scan (1024), a block (256), a warp, and nothing at all
    "one": [1],
    "empty": [0, 3, 0, 0, 5, 0],
    "warp": [31, 32, 33, 64],
    "tile": [1023, 1024, 1025, 4, 2050],
    "long": [9001],
}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 2**-8, "float16": 2**-10}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("segment_simt.cpp")


def bounds(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", LENGTHS)
def test_segment_reduce(kernels: Kernels, name: str, dtype: str, mean: bool, masked: bool) -> None:
    rng = np.random.default_rng(3)
    cu = bounds(LENGTHS[name])
    n, segments = int(cu[-1]), len(cu) - 1
    values = stored(rng.normal(size=n), dtype)
    mask = (rng.random(n) < 0.5).astype(np.float32) if masked else None
    if mask is not None:
        mask[: min(n, 40)] = 0  # a segment of which nothing is left
        values[mask == 0] = stored(np.array([np.nan]), dtype)
    grad = stored(rng.normal(size=segments), dtype)
    wide = [widened(v) for v in np.split(values, cu[1:-1])]
    kept = (
        [np.ones(len(w), bool) for w in wide] if mask is None else [m > 0 for m in np.split(mask, cu[1:-1])]
    )
    scale = [1 / max(k.sum(), 1) if mean else 1.0 for k in kept]
    expected = np.array([w[k].sum() * f for w, k, f in zip(wide, kept, scale, strict=True)])
    magnitude = np.array([np.abs(w[k]).sum() * f for w, k, f in zip(wide, kept, scale, strict=True)])
    shared = [Read(cu, "cu"), segments, None if mask is None else Read(mask, "mask"), n, int(mean)]

    reduced = stored(np.full(segments, np.nan), dtype)
    kernels.run(f"segment_reduce_{dtype}", Read(values, "values"), *shared, Write(reduced))
    assert np.all(np.abs(widened(reduced) - expected) <= TOLERANCE[dtype] * np.maximum(magnitude, 1e-3))

    grad_values = stored(np.full(n, np.nan), dtype)
    kernels.run(f"segment_reduce_backward_{dtype}", Read(grad, "grad"), 1, *shared, Write(grad_values))
    wanted = np.concatenate([g * f * k for g, f, k in zip(widened(grad), scale, kept, strict=True)])
    np.testing.assert_allclose(widened(grad_values), wanted, rtol=TOLERANCE[dtype], atol=1e-7)

    kernels.run(f"segment_reduce_backward_{dtype}", Read(grad[:1], "grad"), 0, *shared, Write(grad_values))
    wanted = np.concatenate([widened(grad)[0] * f * k for f, k in zip(scale, kept, strict=True)])
    np.testing.assert_allclose(widened(grad_values), wanted, rtol=TOLERANCE[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LENGTHS)
def test_gae(kernels: Kernels, name: str, share: float, dtype: str) -> None:
    rng = np.random.default_rng(4)
    cu = bounds(LENGTHS[name])
    n = int(cu[-1])
    rewards, values = (rng.normal(size=n).astype(dtype) for _ in range(2))
    mask = (rng.random(n) < share).astype(np.float32)
    rewards[mask == 0] = np.nan
    gamma, lam = 0.997, 0.95
    expected = np.zeros((2, n))
    for begin, end in itertools.pairwise(cu):
        next_value = next_advantage = 0.0
        for t in range(end - 1, begin - 1, -1):
            if mask[t]:
                delta = float(rewards[t]) + gamma * next_value - float(values[t])
                next_value, next_advantage = float(values[t]), delta + gamma * lam * next_advantage
                expected[:, t] = next_advantage, next_advantage + next_value
    advantages, returns = (np.full(n, np.nan, dtype) for _ in range(2))
    kernels.run(
        f"gae_{dtype}",
        *(
            Read(rewards, "rewards"),
            Read(values, "values"),
            Read(mask, "mask"),
            Read(cu, "cu"),
            len(cu) - 1,
            n,
        ),
        *(gamma, lam, Write(advantages), Write(returns)),
        seed=1,
    )
    np.testing.assert_allclose(advantages, expected[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(returns, expected[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_group_advantage(kernels: Kernels, leave_one_out: bool, normalize_std: bool, dtype: str) -> None:
    rng = np.random.default_rng(5)
    cu = bounds([8, 1, 0, 33, 64, 2, 5, 7])
    n = int(cu[-1])
    rewards = rng.normal(size=n).astype(dtype)
    rewards[cu[6] : cu[7]] = 0.1  # all equal: no advantage, whatever the mean's rounding
    expected = np.zeros(n)
    for begin, end in itertools.pairwise(cu):
        group = rewards[begin:end].astype(np.float64)
        size = end - begin
        if size < 2 or (group == group[0]).all():
            continue
        baseline = (group.sum() - group) / (size - 1) if leave_one_out else group.mean()
        expected[begin:end] = (group - baseline) / (group.std(ddof=1) + 1e-6 if normalize_std else 1.0)
    advantages = np.full(n, np.nan, dtype)
    kernels.run(
        f"group_advantage_{dtype}",
        *(
            Read(rewards, "rewards"),
            Read(cu, "cu"),
            len(cu) - 1,
            n,
            int(leave_one_out),
            int(normalize_std),
            1e-6,
        ),
        Write(advantages),
    )
    np.testing.assert_allclose(advantages, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 5, 3, 8], "fall"),
        ([0, 4, 9], "do not end at T"),
        ([1, 4, 8], "begin with 0"),
        ([0, 12, 8], "exceed|fall"),
    ],
)
def test_wrong_bounds_stop_the_kernel(kernels: Kernels, cu: list[int], message: str) -> None:
    values, bad = np.ones(8, np.float32), np.array(cu, np.int32)
    reduced = np.zeros(len(cu) - 1, np.float32)
    arguments = [Read(values), Read(bad), len(cu) - 1, None, 8, 0, Write(reduced)]
    with pytest.raises(SimtError, match=message):
        kernels.run("segment_reduce_float32", *arguments)
