"""tools/gpu_check.py on the fake GPU, in small sizes: every step runs to its end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.fake_cuda.scenarios.harness import PYTHON, ROOT, Workbench

# All but the build, which needs no GPU: the extension is there.
STEPS = "versions,gpu_tests,sdpa,context_attention,trainer,cuda_ipc,spinning,ops,microbatch"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_passes(bench: Workbench, tmp_path: Path) -> None:
    sizes = ["--quick", "--stretch", "8", "--minutes", "55"]
    ended = subprocess.run(
        [PYTHON, "tools/gpu_check.py", *sizes, "--only", STEPS, "--out", str(tmp_path)],
        cwd=ROOT,
        # MegaRL's kernels by its CPU ones: thread by thread the tests' large cases would take an hour.
        env=bench.variables("cuda", FAKECUDA_MEGARL="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + (tmp_path / "log.txt").read_text()[-6000:]
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: outcome["verdict"] for name, outcome in steps.items()} == dict.fromkeys(
        STEPS.split(","), "passed"
    )
    assert steps["gpu_tests"]["figures"]["tests"]["PASSED"] > 80
    assert steps["trainer"]["figures"]["moe_bfloat16_distributed"]["moved_again"] < 0.05
    assert steps["microbatch"]["figures"]["grpo_waits"]["per_microbatch"] > 0
