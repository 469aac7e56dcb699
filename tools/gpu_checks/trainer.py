"""Check the Megatron trainer of one rank over NCCL against the same steps on the CPU, run concurrently.

Three steps of SFT, one of the policy loss, a checkpoint. The two steps after loading it must equal those
after writing it: the loss of the first one tests the weights, the weights after the second one the optimizer.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_checks import checkpoints
from gpu_checks.report import Report

MODELS = {"dense": checkpoints.TINY, "moe": checkpoints.TINY_MOE}
# model, dtype, distributed optimizer
CASES = (
    ("dense", "float32", False),
    ("dense", "bfloat16", False),
    ("dense", "bfloat16", True),
    ("moe", "bfloat16", False),
    ("moe", "bfloat16", True),
)
# Relative tolerances of loss and gradient norm. In bf16 every matrix product is rounded.
TOLERANCE = {"float32": (1e-4, 2e-3), "bfloat16": (2e-2, 1e-1)}
# After loading: the loss (a forward pass is repeatable up to the order of atomic additions), and the mean
# difference of the weights after two steps, relative to their change.
LOSS_AGAIN, MOVED_AGAIN = 1e-5, 0.05


def run(report: Report) -> None:
    """Check each case in turn; the reference runs in another process, since a process has one platform."""
    with tempfile.TemporaryDirectory() as work:
        folders = {name: checkpoints.write(config, Path(work) / name) for name, config in MODELS.items()}
        command = [sys.executable, "-m", "gpu_checks.trainer", json.dumps(folders)]
        env = os.environ | {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with open(Path(work) / "reference.log", "w+") as log:
            reference = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                found = {case: _try(report, case, folders) for case in CASES}
            finally:
                output, _ = reference.communicate()
            if reference.returncode:
                log.seek(0)
                print(log.read())
                report.problem("the steps on the CPU failed: log.txt says how")
                return
        expected = json.loads(output.splitlines()[-1])
    worst = 0.0
    for case, steps in found.items():
        if steps is not None:
            worst = max(worst, _compare(report, case, steps, expected[_key(case)]))
    done = sum(steps is not None for steps in found.values())
    report.summary(f"{done} of {len(CASES)} cases ran; losses differ from the CPU's by {worst:.1g} at most")


def _key(case: tuple[str, str, bool]) -> str:
    model, dtype, distributed = case
    return f"{model}_{dtype}{'_distributed' if distributed else ''}"


def _try(
    report: Report, case: tuple[str, str, bool], folders: dict[str, str]
) -> list[dict[str, float]] | None:
    import traceback

    import torch

    try:
        torch.cuda.reset_peak_memory_stats()
        steps, facts = steps_of(case, folders, save=True)
    except Exception as error:
        traceback.print_exc()
        report.problem(f"{_key(case)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    facts["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    report.figure(_key(case), facts | {"loss": [step["loss"] for step in steps]})
    for name, limit in (("loss_again", LOSS_AGAIN), ("moved_again", MOVED_AGAIN)):
        report.check(facts[name] < limit, f"{_key(case)}: after loading {name} differs by {facts[name]:.2g}")
    return steps


def _compare(
    report: Report,
    case: tuple[str, str, bool],
    steps: list[dict[str, float]],
    expected: list[dict[str, float]],
) -> float:
    """Return the worst relative difference of the losses."""
    differences = {}
    for name, limit in zip(("loss", "grad_norm"), TOLERANCE[case[1]], strict=True):
        pairs = [(a[name], b[name]) for a, b in zip(steps, expected, strict=True)]
        scale = max(abs(b) for _, b in pairs)  # a policy loss may be nearly 0
        differences[name] = max(abs(a - b) / scale if math.isfinite(a) else math.inf for a, b in pairs)
        report.check(
            differences[name] <= limit, f"{_key(case)}: {name} is off by {differences[name]:.2g}: {pairs}"
        )
    report.figure(f"{_key(case)}_from_cpu", differences)
    return differences["loss"]


def steps_of(
    case: tuple[str, str, bool], folders: dict[str, str], *, save: bool
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return the metrics of four steps; with ``save``, also compare a fifth after loading a checkpoint."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.parallel import ParallelConfig
    from megarl.losses.policy import PolicyLoss
    from megarl.losses.sft import sft_loss
    from megarl.models import load_architecture
    from megarl.ops.policy_loss import PolicyLossOptions
    from megarl.trainer.megatron.initialize import finalize, initialize

    name, dtype, distributed = case
    context = initialize(ParallelConfig(), seed=1)
    from megarl.trainer.megatron.trainer import MegatronTrainer
    from megarl.trainer.passes import fill_logprobs, train_step

    def build() -> Any:
        return MegatronTrainer(
            context,
            load_architecture(folders[name]),
            ModelConfig(path=folders[name], dtype=dtype),
            PackingConfig(max_tokens_per_microbatch=512),
            OptimizerConfig(lr=1e-3, adam_eps=1e-5, lr_warmup_steps=0, distributed=distributed),
            8,
        )

    def prepare(policy: Any, seed: int) -> list[Any]:
        batch, advantages = checkpoints.sequences(seed, 16, 20, 90, 512, prompts=12)
        batches: list[Any] = policy.prepare(batch, "token", advantages=advantages).batches
        return batches

    def step(policy: Any, seed: int) -> dict[str, float]:
        return dict(train_step(policy, prepare(policy, seed), sft_loss, temperature=1.0).metrics)

    try:
        policy = build()
        metrics = [step(policy, seed) for seed in range(3)]
        begin = time.perf_counter()
        batches = prepare(policy, 3)
        fill_logprobs(policy, batches, "old_logprobs", temperature=1.0)
        loss = PolicyLoss(PolicyLossOptions(correction="tis", entropy_coef=0.01))
        metrics.append(dict(train_step(policy, batches, loss, temperature=1.0).metrics))
        facts: dict[str, Any] = {"policy_step_ms": 1e3 * (time.perf_counter() - begin)}
        if save:
            with tempfile.TemporaryDirectory() as folder:
                policy.save(Path(folder), optimizer=True)
                before = _weights(policy)
                losses = [step(policy, seed)["loss"] for seed in (4, 5)]
                other = build()
                other.load(Path(folder))
                again = [step(other, seed)["loss"] for seed in (4, 5)]
            facts["loss_again"] = abs(again[0] - losses[0]) / abs(losses[0])
            moved = (_weights(policy) - before).abs().mean().item()
            facts["moved_again"] = (_weights(other) - _weights(policy)).abs().mean().item() / moved
        return metrics, facts
    finally:
        finalize()


def _weights(policy: Any) -> Any:
    """Return all weights in one vector."""
    import torch

    return torch.cat([param.detach().flatten().float() for param in policy.params.values()])


if __name__ == "__main__":
    all_steps = {_key(case): steps_of(case, json.loads(sys.argv[1]), save=False)[0] for case in CASES}
    print(json.dumps(all_steps))
