"""The trainers of benchmarks/train.py, run by benchmarks/trainers.py."""

from __future__ import annotations

import statistics
import sys
import tempfile
from typing import Any, Literal

import numpy as np

from benchmarks.trainers import (
    Stopwatch,
    Trainer,
    arguments,
    bare_tokenizer,
    clock,
    megarl_policy,
    peak_gib,
    run_trainer,
)

PACK = 512
"""Tokens per row of TRL's packing; no sequence is longer."""


def megarl(
    job: dict[str, Any], backend: Literal["megatron", "torch"] = "megatron", **parallel: Any
) -> dict[str, float]:
    """Run ``megarl sft`` from its loaded data to before its output files."""
    from megarl.losses.sft import sft_loss
    from megarl.records import TokenSequence, TrainBatch
    from megarl.trainer.build import finalize
    from megarl.trainer.passes import train_step

    size = job["batch_size"]
    policy, memory = megarl_policy(job, len(job["sequences"]) // size, backend, **parallel)
    sequences = [TokenSequence(np.array(ids), np.arange(len(ids)) > 0) for ids in job["sequences"]]
    built_with = peak_gib()
    losses = []
    watch = Stopwatch()
    for start in range(0, len(sequences), size):
        batches = policy.prepare(TrainBatch.of(sequences[start : start + size]), "token").batches
        result = train_step(policy, batches, sft_loss, temperature=1.0)
        losses.append(result.metrics["loss"])
    took = watch.read()
    finalize(policy.context)
    return took | memory | {"built_with_gib": built_with, "mean_loss": statistics.mean(losses)}


def trl(job: dict[str, Any], **options: Any) -> dict[str, float]:
    """Run TRL's SFTTrainer in float32 on the same tokens, with its defaults except for ``options``."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    started_with = peak_gib()
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=job["model"],
            args=SFTConfig(**(arguments(job, folder) | {"max_length": PACK} | options)),
            train_dataset=Dataset.from_dict({"input_ids": job["sequences"]}),
            processing_class=bare_tokenizer(),
            callbacks=[clock(took)],
        )
        built_with = peak_gib()
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return took | {
        "started_with_gib": started_with,
        "built_with_gib": built_with,
        "mean_loss": statistics.mean(losses),
    }


def trl_packed(job: dict[str, Any], **options: Any) -> dict[str, float]:
    """Run TRL with as many packed rows per step as hold about a batch's tokens."""
    tokens = sum(map(len, job["sequences"])) / len(job["sequences"]) * job["batch_size"]
    rows = max(1, round(tokens / PACK))
    return trl(job, packing=True, per_device_train_batch_size=rows, **options)


TRAINERS: dict[str, Trainer] = {
    "megarl": megarl,
    "megarl_torch": lambda job: megarl(job, "torch"),
    "trl_padded": trl,
    "trl_packed": trl_packed,
    "trl_packed_without_checkpointing": lambda job: trl_packed(job, gradient_checkpointing=False),
    "megarl_tp2": lambda job: megarl(job, tensor_parallel_size=2, sequence_parallel=True),
    "megarl_pp2": lambda job: megarl(job, pipeline_parallel_size=2),
    "megarl_dp2": megarl,
}

if __name__ == "__main__":
    run_trainer(TRAINERS, sys.argv[1:])
