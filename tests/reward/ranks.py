"""Functions run by trainer ranks in tests of score heads; Megatron is imported inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.losses.reward import RewardLoss
from megarl.records import TrainBatch
from megarl.trainer.passes import evaluate_score_loss, score_step, sequence_scores
from megarl.weights.hf import has_score
from tests.dpo.ranks import NO_WARMUP, make_pairs, pair_gradients
from tests.trainer.ranks import OPTIMIZER, TOTAL_STEPS, export, weights


def build_scorer(context: Any, model_dir: str, budget: int = 96, **optimizer: Any) -> Any:
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.models import load_architecture
    from megarl.models.score import initial_score, score_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    scores = score_architecture(load_architecture(model_dir))
    return MegatronTrainer(
        context,
        scores,
        ModelConfig(path=model_dir),
        PackingConfig(max_tokens_per_microbatch=budget),
        OptimizerConfig(**(OPTIMIZER | NO_WARMUP | optimizer)),
        TOTAL_STEPS,
        initial=initial_score(scores, seed=7),
    )


def reward_steps(
    context: Any, model_dir: str, steps: int, center_coef: float, export_dir: str | None = None
) -> dict[str, Any]:
    """Optimizer steps, a held-out evaluation and scores, on any layout."""
    scorer = build_scorer(context, model_dir)
    log = []
    for step in range(steps):
        pairs = make_pairs(step)
        loss = RewardLoss(len(pairs) // 2, center_coef)
        packed = scorer.prepare(pairs, "token", group_size=2)
        batches = packed.batches
        log.append(score_step(scorer, batches, loss, "last") | packed.split_counts)
    if export_dir is not None:
        export(scorer, model_dir, export_dir)
    return {
        "log": log,
        "held_out": evaluate_score_loss(scorer, batches, loss, "last"),
        "scores": sequence_scores(scorer, pairs).tolist(),
        "weights": weights(scorer),
        "microbatches": len(batches),
        "new_head": not has_score(model_dir),
    }


def reward_gradients(
    context: Any, model_dir: str, pairs: TrainBatch, center_coef: float
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient (by HF name) of one packed step on one rank."""
    scorer = build_scorer(context, model_dir)
    loss = RewardLoss(len(pairs) // 2, center_coef)
    return pair_gradients(scorer, pairs, lambda output: loss(output.scores("last")))


def save_and_load(context: Any, model_dir: str, directory: str) -> tuple[list[float], list[float]]:
    """Scores before a checkpoint and after it was loaded into a fresh scorer, one more step taken by both."""
    from pathlib import Path

    scores = []
    pairs = make_pairs(0)
    loss = RewardLoss(len(pairs) // 2)
    first = build_scorer(context, model_dir)
    score_step(first, first.prepare(pairs, "token", group_size=2).batches, loss, "last")
    if context.is_first:
        Path(directory).mkdir()
    if context.layout.world_size > 1:
        torch.distributed.barrier()
    first.save(Path(directory), optimizer=True)
    second = build_scorer(context, model_dir)
    assert second.load(Path(directory))
    for scorer in (first, second):
        score_step(scorer, scorer.prepare(pairs, "token", group_size=2).batches, loss, "last")
        scores.append(sequence_scores(scorer, pairs).tolist())
    return scores[0], scores[1]
