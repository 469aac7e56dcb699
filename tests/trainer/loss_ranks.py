"""Functions run by ranks in tests of the path from hidden states to the loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from megarl.errors import UserError
from megarl.losses.policy import PolicyLoss
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import TokenSequence
from megarl.trainer.passes import fill_logprobs, train_step
from tests.trainer.ranks import build, make_sequences, prepare, weights

NO_WARMUP = {"lr_warmup_steps": 0, "lr": 1e-2, "adam_eps": 1e-3}


def sequence_level(context: Any, model_dir: str) -> dict[str, Any]:
    """Steps of GSPO with a sequence mask, the last on a sequence with a single target."""
    policy = build(context, model_dir, optimizer=NO_WARMUP)
    options = PolicyLossOptions(
        level="sequence",
        clip_low=0.01,
        clip_high=0.01,
        correction="sequence_mask",
        correction_low=0.7,
        correction_high=2.0,
    )
    log = []
    lone = TokenSequence(list(range(1, 9)), [0] * 7 + [1], [-5.4] * 8)
    for sequences in (make_sequences(3), [lone]):
        batches = prepare(policy, sequences, "sequence").batches
        fill_logprobs(policy, batches, "old_logprobs", temperature=1.0)
        for _ in range(3):
            log.append(train_step(policy, batches, PolicyLoss(options), temperature=1.0).metrics)
    return {"log": log, "weights": weights(policy)}


def full_logits(policy: Any, token_ids: list[int]) -> torch.Tensor:
    """[n, V] of one sequence, of a policy on one rank."""
    from megarl.trainer.megatron.attention import PackedMicrobatch

    positions = torch.arange(len(token_ids))
    packed = PackedMicrobatch(qkv_format="thd", lengths=[len(token_ids)], position_ids=positions)
    with torch.no_grad():
        hidden = policy.chunks[0](
            torch.tensor(token_ids)[None], positions[None], None, packed_seq_params=packed
        )
        return (hidden[:, 0] @ policy.chunks[0].head_weight().T).double()


def truncated_logprobs(logits: torch.Tensor, label: int, heat: float, top_k: int, top_p: float) -> float:
    """Logprob of a sampler that keeps the top_k, of those the fewest with mass top_p, and the label."""
    ordered = sorted(((value / heat, i) for i, value in enumerate(logits.tolist())), reverse=True)
    kept = ordered[:top_k] if top_k else ordered
    mass, reached, support = sum(math.exp(v) for v, _ in kept), 0.0, []
    for value, index in kept:
        if reached >= top_p * mass:
            break
        reached += math.exp(value)
        support.append((value, index))
    if label not in [index for _, index in support]:
        support += [pair for pair in ordered if pair[1] == label]
    [own] = [value for value, index in support if index == label]
    return own - math.log(sum(math.exp(value) for value, _ in support))


SAMPLER: dict[str, Any] = {"temperature": 0.8, "top_k": 120, "top_p": 0.9}


def sequences_with_truncated_logprobs(context: Any, model_dir: str) -> list[TokenSequence]:
    """Sequences whose rollout logprobs are those of SAMPLER, by hand from one rank's full logits."""
    policy = build(context, model_dir)
    done = []
    for sequence in make_sequences(7):
        logits, ids = full_logits(policy, sequence.token_ids), sequence.token_ids
        logprobs = [0.0] + [
            truncated_logprobs(logits[i - 1], ids[i], *SAMPLER.values()) for i in range(1, len(ids))
        ]
        done.append(dataclasses.replace(sequence, rollout_logprobs=np.array(logprobs)))
    return done


def truncated_sampling(context: Any, model_dir: str, sequences: list[TokenSequence]) -> dict[str, Any]:
    """One on-policy step on them; without the sampler's support the logprobs would be others."""
    policy = build(context, model_dir, optimizer=NO_WARMUP)
    loss = PolicyLoss(PolicyLossOptions(entropy_coef=0.01))
    batches = prepare(policy, sequences, "token").batches
    plain = fill_logprobs(policy, batches, "old_logprobs", temperature=SAMPLER["temperature"])
    for batch in batches:
        batch.old_logprobs = None
    result = train_step(policy, batches, loss, **SAMPLER)
    return {
        "plain": plain.metrics(),
        "mismatch": result.mismatch.metrics(),
        "metrics": result.metrics,
        "weights": weights(policy),
    }


def numerics(context: Any, model_dir: str, where: str, check: bool) -> str:
    """The error of a step with one value that is no number, and '' where there is none."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    policy = MegatronTrainer(
        context,
        load_architecture(model_dir),
        ModelConfig(path=model_dir),
        PackingConfig(max_tokens_per_microbatch=64),
        OptimizerConfig(lr=1e-3),
        8,
        check_numerics=check,
    )
    sequences = [
        TokenSequence([10, 11, 12, 13, 14], [0, 0, 1, 1, 1]),
        TokenSequence([20, 21, 22, 23, 24, 25], [0, 0, 0, 1, 1, 1]),
    ]
    batches = prepare(policy, sequences, "token").batches
    if where == "embedding":
        with torch.no_grad():  # the model sees a NaN from token 4 of sequence 1 on
            policy.params["embedding.word_embeddings.weight"][24] = math.nan
    else:
        fill_logprobs(policy, batches, "old_logprobs", temperature=1.0)
        [batch] = batches
        assert batch.old_logprobs is not None
        batch.old_logprobs[batch.labels == 13] = math.inf
    try:
        train_step(policy, batches, PolicyLoss(PolicyLossOptions(), check), temperature=1.0)
    except UserError as error:
        return str(error)
    return ""


def ops_of_a_step(context: Any, model_dir: str) -> set[str]:
    """Names of the native ops that packing, old logprobs, a training step and unpacking call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "megarl":
                called.add(func._opname)
            return func(*args, **(kwargs or {}))

    policy = build(context, model_dir)
    with Record():
        batches = prepare(policy, make_sequences(3), "token").batches
        fill_logprobs(policy, batches, "old_logprobs", temperature=1.0)
        train_step(policy, batches, PolicyLoss(PolicyLossOptions()), temperature=1.0)
    return called


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)
