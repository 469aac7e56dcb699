"""Build trainers of the configured backend; the only module that names a backend's classes.

Backends are imported inside functions: they are heavy, and must come after the platform is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.parallel import ParallelConfig
from megarl.config.trainer import TrainerConfig
from megarl.config.training import TrainingRoot
from megarl.models.score import initial_score, score_architecture
from megarl.models.table import Architecture
from megarl.trainer.interface import RankContext, Trainer

if TYPE_CHECKING:
    from megarl.trainer.megatron.trainer import MegatronTrainer
    from megarl.trainer.torch.trainer import TorchTrainer


def initialize(parallel: ParallelConfig, seed: int, trainer: TrainerConfig | None = None) -> RankContext:
    """Join the other ranks: platform, process groups, random state. The launcher sets RANK and WORLD_SIZE."""
    trainer = trainer or TrainerConfig()
    if trainer.backend == "torch":
        from megarl.trainer.torch.initialize import initialize as join
    else:
        from megarl.trainer.megatron.initialize import initialize as join
    return join(parallel, seed, trainer)


def finalize(context: RankContext) -> None:
    """Destroy the process groups."""
    if context.trainer.backend == "torch":
        from megarl.trainer.torch.initialize import finalize as leave
    else:
        from megarl.trainer.megatron.initialize import finalize as leave
    leave()


def build_trainer(
    config: TrainingRoot, context: RankContext, architecture: Architecture, num_optimizer_steps: int
) -> Trainer:
    """Build the run's trained model, loaded from ``model.path``, with its optimizer."""
    return trainer_class(context)(
        context,
        architecture,
        config.model,
        config.packing,
        config.optimizer,
        num_optimizer_steps,
        check_numerics=config.debug.check_numerics,
        router=config.router,
        lora=config.lora,
    )


def build_scorer(
    config: TrainingRoot,
    context: RankContext,
    architecture: Architecture,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    num_optimizer_steps: int,
) -> Trainer:
    """Build a model with a score head and its optimizer; ``architecture`` is that of ``model.path``.

    A language model gets a new head, drawn with run.seed; a sequence classification model with one label
    keeps its own (:func:`megarl.weights.hf.has_score`).
    """
    scores = score_architecture(architecture)
    return trainer_class(context)(
        context,
        scores,
        model,
        config.packing,
        optimizer,
        num_optimizer_steps,
        check_numerics=config.debug.check_numerics,
        router=config.router,
        initial=initial_score(scores, config.run.seed),
    )


def build_frozen(
    context: RankContext, architecture: Architecture, model: ModelConfig, packing: PackingConfig | None = None
) -> Trainer:
    """Build a model without an optimizer: it computes and exports."""
    return trainer_class(context)(context, architecture, model, packing)


def trainer_class(context: RankContext) -> type[MegatronTrainer] | type[TorchTrainer]:
    """Return the class of the context's backend; both have the same arguments."""
    if context.trainer.backend == "torch":
        from megarl.trainer.torch.trainer import TorchTrainer

        return TorchTrainer
    from megarl.trainer.megatron.trainer import MegatronTrainer

    return MegatronTrainer
