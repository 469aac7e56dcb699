"""Runs with device work delayed as long as possible, to detect missing synchronisation.

On a GPU a launch returns before its kernel has run, and a collective before the other ranks have joined. With
FAKECUDA_STREAM_ORDER=lazy nothing runs until something waits for it, or until a time that no run here
reaches.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.fake_cuda.scenarios.harness import Workbench
from tests.fake_cuda.scenarios.test_training import FP32, two

pytestmark = pytest.mark.timeout(3600)

LAZY = {"FAKECUDA_STREAM_ORDER": "lazy", "FAKECUDA_STREAM_DELAY": "20"}


@pytest.mark.slow
def test_training_waits_where_it_must(bench: Workbench, agree: Callable[..., None]) -> None:
    """Sharded gradients and parameters, both reduced and gathered beside the computation."""
    model = bench.make_model("experts-0")
    options = two(overlap_grad_reduce=True, overlap_param_gather=True) | {"optimizer.distributed": True}
    cuda = bench.run("cuda", "sft", "lazy-sft", model=model, options=options, variables=LAZY)
    cpu = bench.run("cpu", "sft", "lazy-sft-cpu", model=model, options=options)
    agree("sft data 2 with overlap, lazy streams", cuda, cpu, FP32)


@pytest.mark.slow
def test_an_engine_reads_merged_adapters_when_they_are_complete(bench: Workbench) -> None:
    """The merge is launched, and the engine is another process: it is told when the merge is done."""
    options = {
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "optimizer.lr": 1e-1,
        "weights.verify": "checksum",
    }
    run = bench.run(
        "cuda", "grpo", "lazy-lora", model=bench.taught_model("dense"), options=options, variables=LAZY
    )
    assert max(run.column("grad_norm")) > 0, "nothing was learned, nothing had to be merged"
    assert max(run.column("logprob_abs_diff_max")) < 1e-4


@pytest.mark.slow
def test_memory_is_free_on_all_ranks_before_an_engine_wakes(bench: Workbench) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541"]
    program = "tests.fake_cuda.scenarios.give_memory"
    ended = bench.python("cuda", *launch, "-m", program, variables=LAZY)
    ranks = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2
    [engine_took] = [rank["engine"]["engine took"] for rank in ranks if "engine took" in rank["engine"]]
    assert engine_took >= max(rank["engine"]["trainer gave"] for rank in ranks)
    [engine_gave] = [rank["trainer"]["engine gave"] for rank in ranks if "engine gave" in rank["trainer"]]
    assert min(rank["trainer"]["trainer took"] for rank in ranks) >= engine_gave
