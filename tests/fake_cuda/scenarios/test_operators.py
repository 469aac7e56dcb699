"""The operators that the fake GPU computes itself, against their definitions in float64 on a CPU."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.end_to_end.harness import ROOT
from tests.fake_cuda.scenarios.harness import PYTHON, TIMEOUT, Workbench

pytestmark = pytest.mark.timeout(1800)


def run(bench: Workbench, program: str, **settings: str) -> dict[str, Any]:
    ended = subprocess.run(
        [PYTHON, "-m", f"tests.fake_cuda.scenarios.{program}"],
        cwd=ROOT,
        env=bench.variables("cuda", **settings),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    bench.check_nothing_was_skipped()
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
