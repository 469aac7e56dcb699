"""Functions run by a rank for one row of the table of layouts; heavy imports are inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence
from megarl.trainer.passes import fill_logprobs, train_step
from tests.trainer import ranks

LONGEST = 40
NUM_STEPS = 3


def padded(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Every sequence as long as the longest may be, its padding without a loss."""
    longer = []
    for s in sequences:
        rest = (0, LONGEST - len(s))
        assert s.rollout_logprobs is not None
        longer.append(
            replace(
                s,
                token_ids=np.pad(s.token_ids, rest),
                loss_mask=np.pad(s.loss_mask, rest),
                rollout_logprobs=np.pad(s.rollout_logprobs, rest),
            )
        )
    return longer


def proof(
    context: Any, model_dir: str, distributed: bool, repeat: bool
) -> dict[str, tuple[list[list[float]], dict[str, np.ndarray]]]:
    """Per kind of batch and packing: [loss, gradient norm] of 3 optimizer steps, and the first gradients.

    Gradients are by Hugging Face tensor, NaN where this rank has none. ``repeat``: the packed run once more.
    """
    results = {}
    kinds: tuple[Literal["sft", "grpo"], ...] = ("sft", "grpo")
    for kind in kinds:
        for layout in ("packed", "padded", "again") if repeat else ("packed", "padded"):
            results[f"{kind}-{layout}"] = _run(context, model_dir, distributed, kind, layout == "padded")
    return results


def _run(
    context: Any, model_dir: str, distributed: bool, kind: str, pad: bool
) -> tuple[list[list[float]], dict[str, np.ndarray]]:
    optimizer = {"distributed": distributed, "lr_warmup_steps": 0}
    policy = ranks.build(context, model_dir, optimizer=optimizer, budget=LONGEST if pad else 96)
    policy.keep_reference()
    log, gradients = [], {}
    for number in range(NUM_STEPS):
        sequences = ranks.make_sequences(30 + number, longest=LONGEST)
        if pad:
            sequences = padded(sequences)
        batches = ranks.prepare(policy, sequences, "token" if kind == "sft" else "sequence").batches
        if pad:
            assert all(len(batch.cu_seqlens) == 2 for batch in batches)
        loss: Any = sft_loss
        if kind == "grpo":
            loss = ranks.POLICY_LOSS
            fill_logprobs(policy, batches, "old_logprobs", temperature=ranks.TEMPERATURE)
            with policy.reference():
                fill_logprobs(policy, batches, "ref_logprobs", temperature=ranks.TEMPERATURE)
        metrics = train_step(policy, batches, loss, temperature=ranks.TEMPERATURE).metrics
        log.append([metrics["loss"], metrics["grad_norm"]])
        if number == 0 and not distributed:
            gradients = _gradients(policy)
    return log, gradients


def _gradients(policy: Any) -> dict[str, np.ndarray]:
    """This rank's gradients, NaN where another rank's are."""
    from megarl.weights.hf import region_index

    shapes = policy.architecture.hf_shapes()
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for region in policy.regions:
        box = tuple(slice(*span) for span in region.box)
        whole[region.hf][box] = policy.params[region.param].main_grad[region_index(region.index)]
    return {name: grad.numpy() for name, grad in whole.items()}
