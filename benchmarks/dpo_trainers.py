"""One trainer of benchmarks/dpo.py in its process: ``python -m benchmarks.dpo_trainers NAME JOB RESULT``.

JOB is a JSON file with the model's directory and the tokens; RESULT gets seconds and peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MICROBATCH_TOKENS = 1024


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def megarl(job: dict[str, Any]) -> dict[str, float]:
    """The parts of ``megarl dpo``: reference logprobs once, then packed steps."""
    from megarl.config.schema import ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
    from megarl.losses.preference import PreferenceLoss, PreferenceOptions, num_targets
    from megarl.models import load_architecture
    from megarl.records import Sequence
    from megarl.trainer.megatron.initialize import finalize, initialize

    context = initialize(ParallelConfig(), seed=1)
    from megarl.trainer.megatron.policy import MegatronPolicy

    started_with = peak_gib()
    size = job["batch_size"]
    policy = MegatronPolicy(
        context,
        load_architecture(job["model"]),
        ModelConfig(path=job["model"]),
        PackingConfig(max_tokens_per_microbatch=MICROBATCH_TOKENS),
        OptimizerConfig(lr=1e-6),
        len(job["pairs"]) // size,
    )
    sequences = [
        Sequence(prompt + response, [0] * len(prompt) + [1] * len(response))
        for prompt, *responses in job["pairs"]
        for response in responses
    ]
    began = time.perf_counter()
    refs = policy.sequence_logps(sequences)
    reference_seconds = time.perf_counter() - began
    losses = []
    for start in range(0, len(sequences), 2 * size):
        part = sequences[start : start + 2 * size]
        loss = PreferenceLoss(PreferenceOptions(), num_targets(part), refs[start : start + 2 * size])
        result = policy.train_step(policy.prepare(part, "token", group_size=2), loss, temperature=1.0)
        losses.append(result.metrics["loss"])
    seconds = time.perf_counter() - began - reference_seconds
    finalize()
    return {
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "started_with_gib": started_with,
        "first_loss": losses[0],
    }


def trl(job: dict[str, Any], **options: Any) -> dict[str, float]:
    """TRL's DPOTrainer in float32 on the same tokens, otherwise as it comes unless ``options`` say more."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    started_with = peak_gib()
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    class Tokenized(DPOTrainer):
        """The tokens are given."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]")
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in job["pairs"]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job["batch_size"],
            num_train_epochs=1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            max_length=None,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        began = time.perf_counter()
        trainer = Tokenized(
            model=job["model"],
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        made = time.perf_counter() - began  # with precomputed reference logprobs, mostly those
        trainer.train()
    return {
        "seconds": moments[-1] - moments[0],
        "reference_seconds": made if options.get("precompute_ref_log_probs") else 0.0,
        "started_with_gib": started_with,
        "first_loss": float(trainer.state.log_history[0]["loss"]),
    }


TRAINERS: dict[str, Any] = {
    "megarl": megarl,
    "trl": trl,
    "trl_precomputed": lambda job: trl(job, precompute_ref_log_probs=True),
    "trl_without_checkpointing": lambda job: trl(job, gradient_checkpointing=False),
}


def main(name: str, job_file: Path, result_file: Path) -> None:
    """Run one trainer and write what it took."""
    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    result = TRAINERS[name](job)
    result_file.write_text(json.dumps(result | {"peak_gib": peak_gib()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
