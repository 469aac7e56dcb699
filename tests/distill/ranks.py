"""Functions run by trainer ranks in tests of distillation; Megatron is imported inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.records import TokenSequence
from tests.dpo.ranks import NO_WARMUP
from tests.trainer.ranks import OPTIMIZER, TOTAL_STEPS, make_sequences, prepare, weights


def build(
    context: Any,
    student_dir: str,
    teacher_dir: str,
    options: dict[str, Any],
    trainer: dict[str, Any] | None = None,
) -> Any:
    from dataclasses import replace

    from megarl.algorithms.distill import Distiller
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.trainer import TrainerConfig
    from megarl.losses.distill import DistillOptions
    from megarl.models import load_architecture
    from megarl.trainer.build import trainer_class

    context = replace(context, trainer=TrainerConfig(**(trainer or {})))
    kind = trainer_class(context)
    packing = PackingConfig(max_tokens_per_microbatch=96)
    student = kind(
        context,
        load_architecture(student_dir),
        ModelConfig(path=student_dir),
        packing,
        OptimizerConfig(**(OPTIMIZER | NO_WARMUP)),
        TOTAL_STEPS,
    )
    teacher = kind(context, load_architecture(teacher_dir), ModelConfig(path=teacher_dir), packing)
    return Distiller(student, teacher, DistillOptions(**options))


def mismatch(
    context: Any,
    student_dir: str,
    teacher_dir: str,
    options: dict[str, Any],
    drawn_by: dict[str, Any],
    sequences: list[TokenSequence],
) -> dict[str, float]:
    """Mismatch of engine and trainer in one step on samples with the engine's logprobs."""
    from megarl.trainer.outputs import Sampler

    distiller = build(context, student_dir, teacher_dir, options)
    distiller.drawn_by = Sampler(**drawn_by)
    batches = prepare(distiller.student, sequences, "token").batches
    distiller.read_teacher(batches)
    found: dict[str, float] = distiller.step(batches).mismatch.metrics()
    return found


def filled(context: Any, model_dir: str, drawn_by: dict[str, Any], sequences: list[TokenSequence]) -> Any:
    """The same of a forward pass for old logprobs, as in a step that trains only the critic."""
    from megarl.trainer.passes import fill_logprobs

    policy = build(context, model_dir, model_dir, {}).student
    batches = prepare(policy, sequences, "token").batches
    return fill_logprobs(policy, batches, "old_logprobs", **drawn_by).metrics()


def steps(
    context: Any,
    student_dir: str,
    teacher_dir: str,
    options: dict[str, Any],
    count: int,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Optimizer steps on any layout of either backend."""
    distiller = build(context, student_dir, teacher_dir, options, trainer)
    log = []
    for number in range(count):
        batches = prepare(distiller.student, make_sequences(number), "token").batches
        for batch in batches:  # as mini-batches: passes of their own
            distiller.read_teacher([batch])
        result = distiller.step(batches)
        distiller.forget()
        log.append(result.metrics | result.mismatch.metrics())
    return {"log": log, "weights": weights(distiller.student), "teacher": weights(distiller.teacher)}


def gradients(
    context: Any, student_dir: str, teacher_dir: str, options: dict[str, Any], sequences: list[TokenSequence]
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient (by HF name) of one packed step on one rank, without an update."""
    from megarl.weights.hf import region_index

    distiller = build(context, student_dir, teacher_dir, options)
    student = distiller.student
    batches = prepare(student, sequences, "token").batches
    assert len(batches) > 1
    distiller.read_teacher(batches)
    grads = {n: torch.zeros(shape) for n, shape in student.architecture.hf_shapes().items()}

    def look() -> None:
        for region in student.regions:
            box = tuple(slice(*span) for span in region.box)
            grads[region.hf][box] = student.params[region.param].main_grad[region_index(region.index)]

    student.before_update = look
    loss = distiller.step(batches).metrics["loss"]
    return loss, {name: grad.numpy() for name, grad in grads.items()}


def learn(context: Any, student_dir: str, teacher_dir: str, algorithm: dict[str, Any]) -> dict[str, Any]:
    """One step of a learner: the loss and the number of targets of each of its optimizer steps."""
    from megarl.algorithms.distill import DistillLearner
    from megarl.config.distill import DistillConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer
    from tests.algorithms.learner_ranks import MAX_NEW_TOKENS, fake_run, make_groups

    config = DistillConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": student_dir},
            "teacher": {"path": teacher_dir},
            "data": {"train": {"source": "reasoning_gym", "task": "chain_sum"}},
            "rollout": {
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 4,
                "max_new_tokens": MAX_NEW_TOKENS,
            },
            "packing": {"max_tokens_per_microbatch": 64},
            "optimizer": {"lr": 1e-2, "adam_eps": 1e-3},
            "algorithm": algorithm,
            "training": {"num_steps": 4},
        }
    )
    architecture = load_architecture(student_dir)
    policy = MegatronTrainer(context, architecture, config.model, config.packing, config.optimizer, 8)
    learner = DistillLearner(config, fake_run(), policy)
    targets: list[int] = []
    losses: list[float] = []
    take = learner.distiller.step

    def step(batches: Any, trace: Any = None) -> Any:
        targets.append(int(sum(batch.loss_mask.sum() for batch in batches)))
        result = take(batches, trace)
        losses.append(result.metrics["loss"])
        return result

    learner.distiller.step = step  # type: ignore[method-assign]
    learner.learn(1, make_groups(1))
    return {"targets": targets, "losses": losses}


def teacher_top_k(
    context: Any, teacher_dir: str, sequences: list[TokenSequence], k: int, temperature: float
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """Ids and logprobs of the teacher's most likely tokens at every target, microbatch by microbatch."""
    from megarl.losses.distill import top_k_logprobs

    distiller = build(context, teacher_dir, teacher_dir, {})
    batches = prepare(distiller.student, sequences, "token").batches
    distiller.read_teacher(batches)
    found = []
    for batch in batches:
        at = distiller._teacher_at[id(batch)]
        ids, logprobs = top_k_logprobs(at.hidden, at.head, k, temperature)
        found.append((ids.tolist(), logprobs.tolist()))
    return found
