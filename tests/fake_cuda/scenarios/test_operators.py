"""The operators that the fake GPU computes itself, against their definitions in float64 on a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fake_cuda.scenarios.harness import Workbench

pytestmark = pytest.mark.timeout(1800)


def run(bench: Workbench, program: str, **settings: str) -> dict[str, Any]:
    ended = bench.python("cuda", "-m", f"tests.fake_cuda.scenarios.{program}", variables=settings)
    result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def check(differences: dict[str, float]) -> None:
    for name, difference in differences.items():
        assert difference < (2e-2 if "bfloat16" in name or "flash" in name else 1e-5), (name, difference)


@pytest.mark.parametrize("order", ["eager", "lazy"])
def test_torch_operators(bench: Workbench, order: str) -> None:
    result = run(bench, "operators_torch", FAKECUDA_STREAM_ORDER=order)
    assert len(result["differences"]) == 6
    check(result["differences"])
    assert all(result["true"].values()), result["true"]


@pytest.mark.slow
def test_vllm_operators(bench: Workbench) -> None:
    check(run(bench, "operators_vllm")["differences"])
