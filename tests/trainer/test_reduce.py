"""Metrics of all microbatches reduced to one: non-finite values are never lost."""

from __future__ import annotations

import math

import pytest
import torch

from megarl.losses.base import LossResult
from megarl.trainer import reduce
from megarl.trainer.reduce import reduce_results, weights_report


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "gather", lambda value: [value])


def of(value: float, name: str = "ratio_max") -> LossResult:
    return LossResult(torch.zeros(()), maxima={name: torch.tensor(value)})


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0), (1.0, math.nan, 2.0)])
def test_a_maximum_over_nan_is_nan(values: tuple[float, ...]) -> None:
    assert math.isnan(reduce_results([of(value) for value in values])["ratio_max"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_counted(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.full((3, 4), -2.0, dtype=dtype) for _ in range(5)] + [torch.zeros(0, dtype=dtype)]
    assert reduce_results([weights_report(tensors)]) == {"non_finite_weights": 0.0}
    tensors[1][2, 3] = tensors[4][0, 0] = bad
    assert reduce_results([weights_report(tensors), weights_report([])]) == {"non_finite_weights": 2.0}
    assert reduce_results([weights_report([])]) == {"non_finite_weights": 0.0}
