"""The segment kernels (reduce, GAE, group advantage) in the SIMT executor against float64 loops."""

from __future__ import annotations

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
