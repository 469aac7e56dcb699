"""The trainer of benchmarks/context.py, run by benchmarks/trainers.py."""

from __future__ import annotations

import statistics
import sys
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.common import allocations
from benchmarks.trainers import Stopwatch, Trainer, megarl_policy, run_trainer


def turns(job: dict[str, Any]) -> dict[str, Any]:
    """Alternate steps on one batch with two context-parallel ranks, split_from null and set."""
    from megarl.losses.sft import sft_loss
    from megarl.records import TokenSequence, TrainBatch
    from megarl.trainer.megatron import context_attention
    from megarl.trainer.megatron.initialize import finalize
    from megarl.trainer.passes import train_step

    policy, _ = megarl_policy(job, 99, context_parallel_size=2)
    maker, gathered = policy.batch_maker, 0
    maker.packing = maker.packing.model_copy(update={"max_tokens_per_microbatch": job["budget"]})
    data = TrainBatch.of(TokenSequence(np.array(ids), np.arange(len(ids)) > 0) for ids in job["sequences"])
    original = context_attention._gather

    def count(k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, group: Any) -> list[torch.Tensor]:
        nonlocal gathered
        whole = original(k, v, order, group)
        gathered += sum(x.nbytes for x in whole) - k.nbytes - v.nbytes
        return whole

    found: dict[str, Any] = {name: {"seconds": [], "cpu_seconds": []} for name in job["split_from"]}
    for repeat in range(job["repeats"] + 2):  # the first is a warm-up, the last measures memory
        for name, split_from in job["split_from"].items():
            own, gathered = found[name], 0
            maker.split_from = split_from
            packed = policy.prepare(data, "token")
            batches = packed.batches

            def step(batches: list[Any] = batches) -> dict[str, float]:
                return dict(train_step(policy, batches, sft_loss, temperature=1.0).metrics)

            with patch.object(context_attention, "_gather", count):
                if repeat == job["repeats"] + 1:
                    own["peak_bytes"] = max(accumulate(allocations(step)[1], initial=0))
                    continue
                watch = Stopwatch()
                step()
                took = watch.read()
            if repeat:
                for key, value in took.items():
                    own[key].append(value)
            own |= {"gathered_bytes": gathered, "microbatches": len(batches)}
            own["padding"] = packed.num_computed_tokens - data.num_tokens
            own["split"] = packed.split_counts.get("num_split_sequences", len(data))
    finalize()
    for own in found.values():
        own |= {key: statistics.median(own[key]) for key in ("seconds", "cpu_seconds")}
    return found


TRAINERS: dict[str, Trainer] = {"turns": turns}

if __name__ == "__main__":
    run_trainer(TRAINERS, sys.argv[1:])
