"""Functions run by trainer ranks in tests of preference training; Megatron is imported inside."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megarl.losses.preference import PreferenceLoss, PreferenceOptions, num_targets
from megarl.records import TokenSequence, TrainBatch
from megarl.trainer.passes import evaluate_loss, sequence_logprobs, train_step
from tests.trainer.ranks import build, weights

NO_WARMUP = {"lr_warmup_steps": 0, "lr": 1e-2, "adam_eps": 1e-4}


def make_pairs(seed: int, count: int = 5, longest: int = 24, vocab: int = 250) -> TrainBatch:
    """Chosen and rejected of ``count`` pairs, one after the other; each pair shares its prompt."""
    draw = random.Random(seed)
    sequences = []
    for _ in range(count):
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(2, 8))]
        for _ in range(2):
            response = [draw.randrange(vocab) for _ in range(draw.randint(1, longest))]
            mask = np.array([0] * len(prompt) + [1] * len(response))
            sequences.append(TokenSequence(np.array(prompt + response), mask))
    return TrainBatch.of(sequences)


def pair_gradients(trainer: Any, pairs: TrainBatch, read: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient (by HF name) of several microbatches of pairs on one rank, without a step."""
    from megarl.weights.hf import region_index

    batches = trainer.prepare(pairs, "token", group_size=2).batches
    assert len(batches) > 1
    trainer.ddp[0].zero_grad_buffer()
    results = trainer.run(batches, read, grad=True)
    grads = {n: torch.zeros(shape) for n, shape in trainer.architecture.hf_shapes().items()}
    for region in trainer.regions:
        box = tuple(slice(*span) for span in region.box)
        grads[region.hf][box] = trainer.params[region.param].main_grad[region_index(region.index)]
    total = sum(float(result.sums["loss"]) for result in results)
    return total, {name: grad.numpy() for name, grad in grads.items()}


def preference_steps(
    context: Any, model_dir: str, reference_dir: str, options: PreferenceOptions, steps: int
) -> dict[str, Any]:
    """Reference logprobs, optimizer steps and an evaluation of the last batch, on any layout."""
    policy = build(context, model_dir, optimizer=NO_WARMUP, budget=96)
    data = [make_pairs(step) for step in range(steps)]
    with policy.weights_of(reference_dir):
        refs = [sequence_logprobs(policy, pairs) for pairs in data]
    needs_reference = options.loss not in ("simpo", "orpo")
    log, kl = [], 0.0
    for pairs, ref in zip(data, refs, strict=True):
        if options.loss == "kto":
            kl = max(
                0.0, float((ref - sequence_logprobs(policy, pairs)).mean())
            )  # any statistic of the policy
        loss = PreferenceLoss(options, num_targets(pairs), ref if needs_reference else None, kl)
        packed = policy.prepare(pairs, "token", group_size=2)
        batches = packed.batches
        log.append(train_step(policy, batches, loss, temperature=1.0).metrics | packed.split_counts)
    return {
        "log": log,
        "held_out": evaluate_loss(policy, batches, loss),
        "refs": [ref.tolist() for ref in refs],
        "weights": weights(policy),
        "microbatches": len(batches),
    }


def preference_gradients(
    context: Any,
    model_dir: str,
    options: PreferenceOptions,
    pairs: TrainBatch,
    refs: list[float] | None,
    kl: float,
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient (by HF name) of one packed step on one rank."""
    policy = build(context, model_dir)
    table = None if refs is None else torch.tensor(refs, dtype=torch.float64)
    loss = PreferenceLoss(options, num_targets(pairs), table, kl)
    return pair_gradients(policy, pairs, lambda output: loss(output.logprobs()))


def reference_of(
    context: Any, model_dir: str, path: str | None, run_dir: str, sequences: TrainBatch
) -> list[float]:
    """What a run with this reference.path has as the reference's logprobs."""
    from pathlib import Path

    from megarl.config.preference import DpoConfig
    from megarl.loops.reference_logprobs import ReferenceLogprobs
    from tests.algorithms.learner_ranks import fake_run

    config = DpoConfig.model_validate(
        {
            "run": {"dir": run_dir},
            "model": {"path": model_dir},
            "reference": {} if path is None else {"path": path},
            "optimizer": {"lr": 1e-3},
            "data": {"train": {"source": "jsonl", "path": "unused"}},
            "training": {"num_steps": 1, "batch_size": 1},
        }
    )
    policy, run = build(context, model_dir), fake_run()
    run.directory, run.is_first = type("Directory", (), {"path": Path(run_dir)}), True
    run.console.note, run.signal_number = print, lambda: None
    reference = ReferenceLogprobs(config, run, policy, policy.architecture)
    reference.prepare(sequences)
    found: list[float] = reference(sequences).tolist()
    return found


def logps(context: Any, model_dir: str, sequences: TrainBatch, other_dir: str) -> dict[str, Any]:
    """Summed logprobs with the policy's weights, with another directory's, and again with the policy's."""
    policy = build(context, model_dir)
    before = sequence_logprobs(policy, sequences)
    with policy.weights_of(other_dir):
        other = sequence_logprobs(policy, sequences)
    return {
        "before": before.tolist(),
        "other": other.tolist(),
        "after": sequence_logprobs(policy, sequences).tolist(),
    }
