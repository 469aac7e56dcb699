"""Functions run by trainer ranks in tests of low-rank adapters; heavy imports are inside."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.batching.rank_microbatches import gather_from_packed
from megarl.cluster.collectives import broadcast
from megarl.config.lora import LoraConfig
from megarl.losses.sft import sft_loss
from megarl.trainer.passes import fill_logprobs, train_step
from tests.trainer import ranks

Tensors = dict[str, np.ndarray]
OPTIMIZER = {"lr": 4e-3, "lr_schedule": "constant", "min_lr": 0.0, "lr_warmup_steps": 0}


def build(
    context: Any,
    model_dir: str,
    lora: dict[str, Any],
    *,
    distributed: bool = False,
    dtype: Any = "float32",
    budget: int = 96,
) -> Any:
    """A policy with adapters on this rank."""
    optimizer = OPTIMIZER | {"distributed": distributed}
    return ranks.build(
        context, model_dir, optimizer=optimizer, budget=budget, dtype=dtype, lora=LoraConfig(**lora)
    )


def set_adapters(policy: Any, tensors: Tensors) -> None:
    """Set every A and B to its value in ``tensors``, by PEFT's name."""
    params, regions = policy.lora.adapter_tensors()
    with torch.no_grad():
        for region in regions:
            box = tuple(slice(*span) for span in region.box)
            params[region.param].copy_(torch.from_numpy(tensors[region.hf])[box])
    # Master weights are copies.
    policy.optimizer.reload_model_params()


def adapters(policy: Any) -> Tensors:
    """All A and B, on rank 0."""
    return {name: tensor.float().numpy().copy() for name, tensor in policy.weights.adapter_tensors()}


def logprobs(policy: Any, sequences: list[Any], into: Any = "old_logprobs") -> list[np.ndarray]:
    """Logprobs of every sequence's targets, on every rank."""
    packed = ranks.prepare(policy, sequences, "token")
    fill_logprobs(policy, packed.batches, into, temperature=1.0)
    values: np.ndarray = broadcast(gather_from_packed(packed, lambda batch: getattr(batch, into)))
    return np.split(values, np.cumsum([len(s) for s in sequences])[:-1])


def gradients(context: Any, model_dir: str, lora: dict[str, Any], values: Tensors, seed: int) -> Tensors:
    """Gradients of one SFT step's loss by PEFT name, NaN where another rank's part is; and what has none."""

    policy = build(context, model_dir, lora)
    set_adapters(policy, values)
    policy.ddp[0].zero_grad_buffer()
    batches = ranks.prepare(policy, ranks.make_sequences(seed), "token").batches
    assert len(batches) > 1
    policy.run(batches, lambda output: sft_loss(output.logprobs()), grad=True)
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in policy.params.values())
    params, regions = policy.lora.adapter_tensors()
    whole = {name: torch.full(shape, float("nan")) for name, shape in policy.lora.shapes.items()}
    for region in regions:
        box = tuple(slice(*span) for span in region.box)
        whole[region.hf][box] = params[region.param].main_grad
    return {name: grad.numpy() for name, grad in whole.items()}


def train(
    context: Any,
    model_dir: str,
    lora: dict[str, Any],
    steps: list[int],
    *,
    values: Tensors | None = None,
    distributed: bool = False,
    load: str | None = None,
    save: str | None = None,
    kinds: str = "sft",
) -> dict[str, Any]:
    """Optimizer steps from ``values`` (None: the adapters as they are made), or from a checkpoint.

    ``kinds`` "both": policy steps with old and reference logprobs in between.
    """
    policy = build(context, model_dir, lora, distributed=distributed)
    if values is not None:
        set_adapters(policy, values)
    policy.keep_reference()
    if load is not None:
        policy.load(Path(load))
    initial, log = adapters(policy), []
    for number in steps:
        batches = ranks.prepare(policy, ranks.make_sequences(number), "token").batches
        loss: Any = sft_loss
        if kinds == "both" and number % 2:
            loss = ranks.POLICY_LOSS
            fill_logprobs(policy, batches, "old_logprobs", temperature=ranks.TEMPERATURE)
            with policy.reference():
                fill_logprobs(policy, batches, "ref_logprobs", temperature=ranks.TEMPERATURE)
        metrics = train_step(policy, batches, loss, temperature=1.0).metrics
        log.append([metrics["loss"], metrics["grad_norm"], metrics.get("ref_kl", 0.0)])
    if save is not None:
        policy.save(Path(save), optimizer=True)
    return {
        "initial": initial,
        "log": log,
        "adapters": adapters(policy),
        "weights": ranks.weights(policy),
        "random": random.random(),
    }


def export_both(
    context: Any, model_dir: str, lora: dict[str, Any], values: Tensors, directory: str, ids: list[list[int]]
) -> np.ndarray:
    """Write merged weights and adapter; the trainer's own logits [T, V] of sequences in one microbatch."""
    from megarl.trainer.megatron.attention import PackedMicrobatch
    from megarl.weights.peft import export_adapter

    policy = build(context, model_dir, lora)
    set_adapters(policy, values)
    ranks.export(policy, model_dir, f"{directory}/hf")
    export_adapter(
        f"{directory}/adapter",
        model_dir,
        policy.architecture,
        LoraConfig(**lora),
        policy.weights.adapter_tensors(),
    )
    lengths = [len(s) for s in ids]
    packed = PackedMicrobatch(
        qkv_format="thd", lengths=lengths, position_ids=torch.cat([torch.arange(n) for n in lengths])
    )
    tokens = torch.tensor([token for s in ids for token in s])
    with torch.no_grad():
        hidden = policy.chunks[0](tokens[None], packed.position_ids[None], None, packed_seq_params=packed)
        return (hidden[:, 0] @ policy.chunks[0].head_weight().T).numpy()


def reference_facts(context: Any, model_dir: str, lora: dict[str, Any], values: Tensors) -> dict[str, Any]:
    """Logprobs of the model without adapters, of the policy, of its reference, and what is kept in memory."""
    sequences = ranks.make_sequences(5)
    base = ranks.build(context, model_dir)
    facts: dict[str, Any] = {"base": logprobs(base, sequences)}
    policy = build(context, model_dir, lora)
    set_adapters(policy, values)
    policy.keep_reference()
    facts["copy"] = policy._reference
    facts["own"] = logprobs(policy, sequences)
    with policy.reference():
        facts["reference"] = logprobs(policy, sequences)
    facts["again"] = logprobs(policy, sequences)
    return facts


def publish_facts(context: Any, model_dir: str, lora: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Train and publish in turn: are frozen weights ever touched, and are published ones fresh each time?"""
    policy = build(context, model_dir, lora, dtype=dtype)
    before = {name: param.detach().clone() for name, param in policy.params.items()}
    policy.weights.owners()  # on a CPU this moves storages
    addresses = {name: param.data_ptr() for name, param in policy.params.items()}
    offered = {name: tensor.data_ptr() for name, tensor in policy.weights._params.items()}
    fresh = []
    for number in range(5):
        train_step(
            policy,
            ranks.prepare(policy, ranks.make_sequences(number), "token").batches,
            sft_loss,
            temperature=1.0,
        )
        policy.weights.publish()
        policy.weights.publish()
        published = {name: tensor.clone() for name, tensor in policy.weights._params.items()}
        # From the frozen weights as they were at the start, and A and B as they are exported.
        matrices = adapters(policy)
        regions = {r.hf: r for r in policy.regions}
        worst = 0.0
        for name in policy.architecture.hf_shapes():
            a = matrices.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
            rows = tuple(slice(*span) for span in regions[name].index)  # type: ignore[misc]
            expected = before[regions[name].param][rows].double()
            if a is not None:
                b = matrices[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
                delta = torch.from_numpy(b).double() @ torch.from_numpy(a).double()
                expected += lora["alpha"] / lora["rank"] * delta
            got = published[regions[name].param][rows].double()
            worst = max(worst, float(((got - expected).abs() / expected.abs().clamp(min=0.1)).max()))
        fresh.append(worst)
    return {
        "untouched": all(torch.equal(before[name], param) for name, param in policy.params.items()),
        "stayed": addresses == {name: param.data_ptr() for name, param in policy.params.items()},
        "offered_stayed": offered == {n: t.data_ptr() for n, t in policy.weights._params.items()},
        "copied": sorted(name for name, address in offered.items() if address != addresses[name]),
        "worst": fresh,
    }


def memory(context: Any, model_dir: str, lora: dict[str, Any] | None) -> dict[str, int]:
    """Elements of gradients and optimizer state after a step, and of what engines get a copy of."""
    policy = ranks.build(context, model_dir) if lora is None else build(context, model_dir, lora)
    train_step(
        policy, ranks.prepare(policy, ranks.make_sequences(1), "token").batches, sft_loss, temperature=1.0
    )
    buffers = [buffer for chunk in policy.ddp for buffer in chunk.buffers]
    states = [
        value
        for optimizer in policy.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    policy.weights.owners()
    apart = [
        t for name, t in policy.weights._params.items() if t.data_ptr() != policy.params[name].data_ptr()
    ]
    return {
        "adapted": sum(tensor.numel() for tensor in apart),
        "gradients": sum(buffer.grad_data.numel() for buffer in buffers),
        "optimizer": sum(value.numel() for value in states),
        "parameters": sum(param.numel() for param in policy.params.values()),
    }


def train_and_wait(
    context: Any, model_dir: str, lora: dict[str, Any], directory: str, steps: int, transport: Any
) -> None:
    """Three optimizer steps, published and exported to ``export-N``, the engine checked; ``steps`` times.

    Messages as ranks.train_and_wait has them.
    """
    place = Path(directory)
    policy = build(context, model_dir, lora)
    owners = policy.weights.owners(transport)
    if context.is_first:
        ranks.put(place / "owners", owners)
    ranks.take(place / "attached")
    for step in range(1, steps + 1):
        for number in range(3):  # in the very first B is 0 and A has no gradient
            batches = ranks.prepare(policy, ranks.make_sequences(number), "token").batches
            train_step(policy, batches, sft_loss, temperature=1.0)
        policy.weights.publish()
        ranks.export(policy, model_dir, str(place / f"export-{step}"))
        torch.distributed.barrier()
        if context.is_first:
            ranks.put(place / f"trained-{step}", None)
        regions = ranks.take(place / f"checksums-{step}")
        mine = policy.weights.checksums([query for query, _ in regions])
        wrong = [number for number, value in mine.items() if value != regions[number][1]]
        ranks.put(place / f"wrong-{step}-{context.rank}", wrong)
