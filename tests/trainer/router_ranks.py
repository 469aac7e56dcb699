"""Functions run by trainer ranks in tests of routing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megarl.losses.policy import PolicyLoss
from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence
from megarl.trainer.passes import fill_logprobs, train_step
from tests.trainer.ranks import (
    OPTIMIZER,
    POLICY_LOSS,
    TEMPERATURE,
    TOTAL_STEPS,
    make_sequences,
    prepare,
    weights,
)


def build(context: Any, model_dir: str, router: dict[str, Any] | None = None, budget: int = 96) -> Any:
    """A policy with router settings; learning at full rate from the first step."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.router import RouterConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    return MegatronTrainer(
        context,
        load_architecture(model_dir),
        ModelConfig(path=model_dir),
        PackingConfig(max_tokens_per_microbatch=budget),
        OptimizerConfig(**(OPTIMIZER | {"lr_warmup_steps": 0})),
        TOTAL_STEPS,
        router=RouterConfig(**(router or {})),
    )


def own_choices(policy: Any, sequence: TokenSequence) -> np.ndarray:
    """What the routers of a single rank choose for a sequence alone: [n, layers, k]."""
    from megarl.trainer.megatron.router import PolicyRouter

    found: list[np.ndarray] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        choice = output[1]
        found.append(choice.nonzero()[:, 1].view(choice.shape[0], -1).numpy())

    routers = [m for m in policy.chunks[0].modules() if isinstance(m, PolicyRouter)]
    hooks = [router.register_forward_hook(keep) for router in routers]
    fill_logprobs(policy, prepare(policy, [sequence], "token").batches, "old_logprobs", temperature=1.0)
    for hook in hooks:
        hook.remove()
    return np.stack(found, axis=1).astype(np.int16)


def replay_of_oneself(context: Any, model_dir: str) -> list[dict[str, Any]]:
    """Three steps without and with replay of the router's own choices: metrics and weights of both."""
    answers = []
    for replayed in (False, True):
        policy = build(context, model_dir)
        log = []
        for seed in range(3):
            sequences = make_sequences(seed)
            if replayed:
                sequences = [replace(s, experts=own_choices(policy, s)) for s in sequences]
                sequences[0].experts[-1] = -1  # as where the engine stopped
            batches = prepare(policy, sequences, "token").batches
            log.append(train_step(policy, batches, POLICY_LOSS_ALONE, temperature=TEMPERATURE).metrics)
        answers.append({"log": log, "weights": weights(policy)})
    return answers


_offered: list[Any] = []  # policies whose memory an engine may be reading


def offer(context: Any, model_dir: str) -> Any:
    """What rank 0 tells an engine; the weights stay alive."""
    policy = build(context, model_dir)
    _offered[:] = [policy]
    return policy.weights.owners("auto")


def replayed_logprobs(
    context: Any, model_dir: str, sequences: list[TokenSequence], temperature: float = 1.0
) -> list[list[float]]:
    """Logprobs [n - 1] of each sequence's tokens, all packed together, under its ``experts``."""
    from megarl.batching.pack import unpack

    policy = build(context, model_dir, budget=4096)
    policy.batch_maker.packing = policy.batch_maker.packing.model_copy(update={"share_prefix": "off"})
    [batch] = prepare(policy, sequences, "token").batches
    fill_logprobs(policy, [batch], "old_logprobs", temperature=temperature)
    values = unpack(batch.old_logprobs, batch)
    indices = [int(batch.sequence_ids[start]) for start in batch.cu_seqlens[:-1].tolist()]
    found = dict(zip(indices, values, strict=True))
    return [found[i][1:].tolist() for i in range(len(sequences))]


def train_routed(
    context: Any,
    model_dir: str,
    steps: list[list[TokenSequence]],
    router: dict[str, Any],
    share_prefix: str = "off",
    budget: int = 4096,
) -> dict[str, Any]:
    """Policy steps with old and reference logprobs; metrics, weights and the bias."""
    policy = build(context, model_dir, router, budget)
    policy.batch_maker.packing = policy.batch_maker.packing.model_copy(update={"share_prefix": share_prefix})
    policy.keep_reference()
    log = []
    for sequences in steps:
        batches = prepare(policy, sequences, "token").batches
        fill_logprobs(policy, batches, "old_logprobs", temperature=TEMPERATURE)
        with policy.reference():
            fill_logprobs(policy, batches, "ref_logprobs", temperature=TEMPERATURE)
        result = train_step(policy, batches, POLICY_LOSS, temperature=TEMPERATURE)
        log.append(result.metrics | {"worst": result.mismatch.metrics()["logprob_abs_diff_max"]})
    return {"log": log, "weights": weights(policy)}


def balanced_gradients(
    context: Any, model_dir: str, sequence: TokenSequence, coef: float
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of one SFT step with a load-balancing loss, and its gradients by Hugging Face name."""
    from megarl.weights.hf import region_index

    policy = build(context, model_dir, {"aux_loss_coef": coef})
    policy.optimizer.step = lambda: (True, 0.0, None)  # leave the gradients as they are
    metrics = train_step(
        policy, prepare(policy, [sequence], "token").batches, sft_loss, temperature=1.0
    ).metrics
    grads = {n: torch.zeros(shape) for n, shape in policy.architecture.hf_shapes().items()}
    for region in policy.regions:
        box = tuple(slice(*span) for span in region.box)
        grads[region.hf][box] = policy.params[region.param].main_grad[region_index(region.index)]
    return metrics, {name: grad.numpy() for name, grad in grads.items()}


def grouped_against_loop(context: Any, splits: list[list[int]]) -> list[float]:
    """Largest difference of outputs and gradients of the two ways through experts, in float32."""
    from megarl.trainer.megatron.experts import grouped_linear, looped_linear

    differences = []
    for counts in splits:
        torch.manual_seed(0)
        values = [torch.randn(sum(counts), 16), torch.randn(len(counts), 24, 16)]
        answers = []
        for linear in (grouped_linear, looped_linear):
            inputs = [value.clone().requires_grad_() for value in values]
            out = linear(*inputs, counts)
            (out * torch.arange(24.0)).sum().backward()
            answers.append([out, *(x.grad for x in inputs)])
        differences += [float((a - b).abs().max()) for a, b in zip(*answers, strict=True)]
    return differences


POLICY_LOSS_ALONE = PolicyLoss(replace(POLICY_LOSS.options, kl="none", kl_coef=0.0))
