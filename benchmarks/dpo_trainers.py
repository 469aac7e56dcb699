"""The trainers of benchmarks/dpo.py, run by benchmarks/trainers.py."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

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


def megarl(job: dict[str, Any]) -> dict[str, float]:
    """Run the parts of ``megarl dpo``: reference logprobs once, then packed steps."""
    from megarl.losses.preference import PreferenceLoss, PreferenceOptions, num_targets
    from megarl.records import TokenSequence, TrainBatch
    from megarl.trainer.megatron.initialize import finalize
    from megarl.trainer.passes import sequence_logprobs, train_step

    size = job["batch_size"]
    policy, memory = megarl_policy(job, len(job["pairs"]) // size)
    sequences = [
        TokenSequence(np.array(prompt + response), np.arange(len(prompt + response)) >= len(prompt))
        for prompt, *responses in job["pairs"]
        for response in responses
    ]
    watch = Stopwatch()
    refs = sequence_logprobs(policy, TrainBatch.of(sequences))
    reference = watch.read()
    watch.start()
    losses = []
    for start in range(0, len(sequences), 2 * size):
        part = TrainBatch.of(sequences[start : start + 2 * size])
        loss = PreferenceLoss(PreferenceOptions(), num_targets(part), refs[start : start + 2 * size])
        batches = policy.prepare(part, "token", group_size=2).batches
        result = train_step(policy, batches, loss, temperature=1.0)
        losses.append(result.metrics["loss"])
    took = watch.read() | {f"reference_{name}": value for name, value in reference.items()}
    finalize()
    return took | memory | {"first_loss": losses[0]}


def trl(job: dict[str, Any], **options: Any) -> dict[str, float]:
    """Run TRL's DPOTrainer in float32 on the same tokens, with its defaults except for ``options``."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    started_with = peak_gib()

    class Tokenized(DPOTrainer):
        """A DPOTrainer on tokenised data."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in job["pairs"]]
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**arguments(job, folder), max_length=None, **options)
        watch = Stopwatch()
        trainer = Tokenized(
            model=job["model"],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=bare_tokenizer(),
            callbacks=[clock(took)],
        )
        made = watch.read()  # with precomputed reference logprobs, mostly their time
        trainer.train()
    before = options.get("precompute_ref_log_probs", False)
    took |= {f"reference_{name}": value * before for name, value in made.items()}
    return took | {
        "started_with_gib": started_with,
        "first_loss": float(trainer.state.log_history[0]["loss"]),
    }


TRAINERS: dict[str, Trainer] = {
    "megarl": megarl,
    "trl": trl,
    "trl_precomputed": lambda job: trl(job, precompute_ref_log_probs=True),
    "trl_without_checkpointing": lambda job: trl(job, gradient_checkpointing=False),
}

if __name__ == "__main__":
    run_trainer(TRAINERS, sys.argv[1:])
