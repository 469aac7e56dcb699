"""What a rank does in tests of the torch backend; heavy imports are inside."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np

from megarl.losses.preference import PreferenceLoss, PreferenceOptions, num_targets
from megarl.losses.sft import sft_loss
from megarl.trainer.passes import fill_logprobs, sequence_logprobs, train_step
from tests.dpo.ranks import make_pairs
from tests.trainer import ranks

NUM_STEPS = 3
OPTIMIZER = {"lr_warmup_steps": 0}
KINDS = ("sft", "grpo", "dpo")


def build(
    context: Any,
    model_dir: str,
    backend: str = "torch",
    *,
    trainer: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    budget: int = 96,
    any_family: bool = False,
    architecture: Any = None,
    **options: Any,
) -> Any:
    """A trainer of either backend on this rank."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.trainer import TrainerConfig
    from megarl.models import load_architecture
    from megarl.trainer.build import trainer_class

    context = replace(context, trainer=TrainerConfig(backend=backend, **(trainer or {})))
    return trainer_class(context)(
        context,
        architecture or load_architecture(model_dir, any_family=any_family),
        ModelConfig(path=model_dir),
        PackingConfig(max_tokens_per_microbatch=budget),
        OptimizerConfig(**(ranks.OPTIMIZER | OPTIMIZER | (optimizer or {}))),
        ranks.TOTAL_STEPS,
        **options,
    )


def offload_policies(context: Any, model_dir: str, trainer: dict[str, Any]) -> set[str]:
    """Names of the offload policies of FSDP's modules; none without FSDP."""
    sharded = build(context, model_dir, trainer=trainer).model
    groups = [module._get_fsdp_state()._fsdp_param_group for module in sharded.fsdp_modules()]
    return {type(group.offload_policy).__name__ for group in groups if group is not None}


def step(policy: Any, kind: str, number: int) -> dict[str, float]:
    """One optimizer step of a kind, on the batch of that number."""
    if kind == "dpo":
        pairs = make_pairs(number)
        with policy.reference():
            refs = sequence_logprobs(policy, pairs)
        loss: Any = PreferenceLoss(PreferenceOptions("dpo", beta=0.5), num_targets(pairs), refs)
        batches = policy.prepare(pairs, "token", group_size=2).batches
        return dict(train_step(policy, batches, loss).metrics)
    sequences = ranks.make_sequences(30 + number)
    batches = ranks.prepare(policy, sequences, "token" if kind == "sft" else "sequence").batches
    loss = sft_loss
    if kind == "grpo":
        loss = ranks.POLICY_LOSS
        fill_logprobs(policy, batches, "old_logprobs", temperature=ranks.TEMPERATURE)
        with policy.reference():
            fill_logprobs(policy, batches, "ref_logprobs", temperature=ranks.TEMPERATURE)
    return dict(train_step(policy, batches, loss, temperature=ranks.TEMPERATURE).metrics)


def is_freed(context: Any, model_dir: str, backend: str) -> bool:
    """Train a step; return whether no parameter is left once the trainer is dropped."""
    policy = build(context, model_dir, backend)
    policy.keep_reference()
    step(policy, "grpo", 1)
    held = policy.model if backend == "torch" else policy
    params = [weakref.ref(param) for param in held.params.values()]
    del policy, held
    gc.collect()
    return bool(params) and all(param() is None for param in params)


def steps(
    context: Any, model_dir: str, backend: str = "torch", trainer: dict[str, Any] | None = None
) -> dict[str, list[dict[str, float]]]:
    """Metrics of three optimizer steps on each kind of batch; a new trainer for each."""
    found = {}
    for kind in KINDS:
        policy = build(context, model_dir, backend, trainer=trainer)
        policy.keep_reference()
        found[kind] = [step(policy, kind, number) for number in range(NUM_STEPS)]
    return found


def assert_equal_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses and gradient norms within 1e-5, all else that is logged within 1e-4.

    But for the share of pairs with a margin above 0: of the first step's all margins are rounding.
    """
    assert found.keys() == expected.keys()
    for kind, logs in expected.items():
        assert np.ptp([each["grad_norm"] for each in logs]) > 0.01, "the steps differ"
        for number, (one, other) in enumerate(zip(found[kind], logs, strict=True)):
            for name in {"loss", "grad_norm", "lr", *(one.keys() & other.keys())} - {"reward_accuracy"}:
                error = abs(one[name] - other[name]) / max(abs(other[name]), 0.1)
                bound = 1e-5 if name in ("loss", "grad_norm", "lr") else 1e-4
                assert error < bound, (kind, number, name, one[name], other[name])


def adapted(context: Any, model_dir: str, backend: str) -> dict[str, Any]:
    """Steps with adapters, and what they make of the weights (on rank 0)."""
    from megarl.config.lora import LoraConfig

    policy = build(context, model_dir, backend, lora=LoraConfig(rank=4, alpha=6.0))
    policy.keep_reference()
    log = [step(policy, "grpo", number) for number in range(NUM_STEPS)]
    return {
        "steps": {"grpo": log},
        "merged": ranks.weights(policy),
        "adapters": {name: tensor.numpy() for name, tensor in policy.weights.adapter_tensors()},
    }


def critic(context: Any, model_dir: str, backend: str) -> list[list[float]]:
    """Loss and gradient norm of steps of a reward model, with a new head."""
    from megarl.losses.reward import RewardLoss
    from megarl.models import load_architecture
    from megarl.models.score import initial_score, score_architecture
    from megarl.trainer.passes import score_step

    architecture = score_architecture(load_architecture(model_dir))
    trainer = build(
        context, model_dir, backend, architecture=architecture, initial=initial_score(architecture, 3)
    )
    log = []
    for number in range(NUM_STEPS):
        pairs = make_pairs(number)
        batches = trainer.prepare(pairs, "token", group_size=2).batches
        metrics = score_step(trainer, batches, RewardLoss(len(pairs) // 2, 0.01), "last")
        log.append([metrics["loss"], metrics["grad_norm"]])
    return log


def save(context: Any, model_dir: str, directory: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint that is written while training goes on, and a third step."""
    from pathlib import Path

    policy = build(context, model_dir, trainer=trainer)
    policy.keep_reference()
    step(policy, "sft", 0)
    policy.keep_reference()
    step(policy, "grpo", 1)
    saved = ranks.weights(policy)
    pending = policy.start_save(Path(directory), optimizer=True)
    third = step(policy, "sft", 2)
    pending.finish()
    return {"weights": saved, "third": third}


def go_on(context: Any, model_dir: str, directory: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """The third step of a run whose checkpoint another layout wrote."""
    from pathlib import Path

    policy = build(context, model_dir, trainer=trainer)
    policy.keep_reference()
    same = policy.load(Path(directory))
    return {"random_states": same, "weights": ranks.weights(policy), "third": step(policy, "sft", 2)}


def load_error(context: Any, model_dir: str, backend: str, directory: str) -> str:
    """What the user reads where a checkpoint is another backend's."""
    from pathlib import Path

    from megarl.errors import UserError

    try:
        build(context, model_dir, backend).load(Path(directory))
    except UserError as error:
        return str(error)
    return ""


def exchange(context: Any, model_dir: str) -> dict[str, Any]:
    """What a reference pass leaves as it was, in memory that an engine may read."""
    import torch

    policy = build(context, model_dir)
    policy.keep_reference()
    batches = ranks.prepare(policy, ranks.make_sequences(5), "token").batches

    def logprobs(field: Any) -> Any:
        fill_logprobs(policy, batches, field, temperature=1.0)
        return torch.cat([getattr(batch, field) for batch in batches]).clone()

    before = logprobs("old_logprobs")
    step(policy, "sft", 0)
    own, values = logprobs("old_logprobs"), {n: t.clone() for n, t in policy.model.tensors.items()}
    at = {name: tensor.data_ptr() for name, tensor in policy.model.tensors.items()}
    with policy.reference():
        reference = logprobs("ref_logprobs")
        inside = all(torch.equal(values[n], t) for n, t in policy.model.tensors.items())
    again = logprobs("old_logprobs")
    return {
        "reference_is_the_start": torch.equal(reference, before),
        "trained_since": not torch.equal(own, before),
        "engines_see_nothing": inside or policy.model.mesh is None,
        "back": torch.equal(again, own) and at == {n: t.data_ptr() for n, t in policy.model.tensors.items()},
    }


def offer_and_train(
    context: Any, model_dir: str, trainer: dict[str, Any], lora: bool, directory: str, syncs: int
) -> None:
    """Steps, each followed by what an engine needs to know of it and a wait until it has read the weights.

    Messages are files in ``directory``: owners, then for each step exported-N from rank 0 and read-N from the
    engine's side.
    """
    from pathlib import Path

    from megarl.config.lora import LoraConfig

    place, adapters = Path(directory), {"lora": LoraConfig(rank=4)} if lora else {}
    policy = build(context, model_dir, trainer=trainer, **adapters)
    owners = policy.weights.owners()
    if context.is_first:
        ranks.put(place / "owners", owners)
    for number in range(syncs):
        step(policy, "sft", number)
        policy.weights.publish()
        exported = ranks.weights(policy)
        if context.is_first:
            ranks.put(place / f"exported-{number}", exported)
        ranks.take(place / f"read-{number}")


def held(context: Any, model_dir: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """Bytes of this rank's parameters, moments and masters, and its boxes of the checkpoint's tensors."""
    policy = build(context, model_dir, trainer=trainer)
    step(policy, "sft", 0)
    state = [tensor.nbytes for _, _, tensor in policy.optimizer.state()]
    return {
        "parameters": sum(policy.model.tensors[name].nbytes for name in policy.model.params),
        "optimizer": sum(state),
        "boxes": {(region.hf, region.box) for region in policy.regions},
    }


def gathered(context: Any, model_dir: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """Bytes this rank receives in the all-gathers of one microbatch, and in its reduction."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        gathered = reduced = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, size = str(func), dist.get_world_size()
            if name.startswith("c10d.") and _first(args[0]).dtype == torch.float32:  # others are pickles
                if "allgather" in name or "all_gather" in name:
                    self.gathered += _first(args[0]).nbytes * (size - 1) // size
                if "reduce_scatter" in name:
                    self.reduced += _first(args[0]).nbytes * (size - 1)
            return func(*args, **(kwargs or {}))

    def _first(value: Any) -> torch.Tensor:
        while not isinstance(value, torch.Tensor):
            value = value[0]
        return value

    policy = build(context, model_dir, trainer=trainer, budget=4096)
    batches = ranks.prepare(policy, ranks.make_sequences(30), "token").batches
    assert len(batches) == 1
    step(policy, "sft", 0)
    with Count() as count:
        policy.optimizer_step(batches, lambda output: sft_loss(output.logprobs()))
    return {"gathered": count.gathered, "reduced": count.reduced}


def save_adapters(context: Any, model_dir: str, run_dir: str) -> dict[str, Any]:
    """A checkpoint of adapters after two steps, as a run keeps it, and the merged weights (on rank 0)."""
    from pathlib import Path

    from megarl.config.lora import LoraConfig

    policy = build(context, model_dir, lora=LoraConfig(rank=4, alpha=6.0))
    step(policy, "sft", 0)
    step(policy, "sft", 1)
    directory = Path(run_dir) / "checkpoints" / "step_2"
    if context.is_first:
        directory.mkdir(parents=True)
    policy.save(directory, optimizer=True)
    return ranks.weights(policy)
