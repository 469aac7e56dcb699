"""The quickstart's three commands on the fake GPU, with its configurations as shipped and fewer steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fake_cuda.scenarios.harness import Finished, Workbench
from tests.fake_cuda.scenarios.test_online import LOGPROBS_AGREE
from tests.fake_cuda.scenarios.test_training import FP32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def command(bench: Workbench, where: str, name: str, *arguments: str) -> Finished:
    ended = bench.python(where, *arguments)
    return Finished(bench.folder / name, ended.stdout + ended.stderr)


def test_quickstart(bench: Workbench, agree: Callable[..., None]) -> None:
    model = bench.folder / "quickstart-model"
    command(bench, "cuda", model.name, "tools/make_tiny_model.py", "--output", str(model), "--seed", "1")
    runs = {}
    for where in ("cuda", "cpu"):
        name = f"quickstart-sft-{where}"
        sft = ["-m", "megarl.cli", "sft", "--config", "configs/quickstart_sft.yaml"]
        options = [f"run.dir={bench.folder / name}", f"model.path={model}", "training.num_steps=16"]
        runs[where] = command(bench, where, name, *sft, *options)
    agree("quickstart, SFT", runs["cuda"], runs["cpu"], FP32)

    name = "quickstart-grpo"
    grpo = [
        "-m",
        "megarl.cli",
        "grpo",
        "--config",
        "configs/quickstart_grpo.yaml",
        f"run.dir={bench.folder / name}",
    ]
    options = ["training.num_steps=4", "rollout.num_prompts_per_step=4", "evaluation.num_prompts=8"]
    small = ["rollout.engine.max_num_batched_tokens=256", "rollout.engine.kv_cache_gib=0.02"]
    options += [f"model.path={runs['cuda'].directory / 'hf'}", "rollout.engine.max_num_seqs=32", *small]
    run = command(bench, "cuda", name, *grpo, *options)
    assert "0 bytes to move" in run.output
    assert max(run.column("logprob_abs_diff_max")) < LOGPROBS_AGREE["float32"]
    assert (run.directory / "report.html").exists()
