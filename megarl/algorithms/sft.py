"""Supervised fine-tuning: the mean negative logprob of the demonstrations' response tokens.

    L = -1/T sum_t log p(token t | those before it)

over all T targets of a step's ``training.batch_size`` sequences, on all ranks.
"""

from __future__ import annotations

from megarl.config.sft import SftConfig
from megarl.data.sft import SftDataset
from megarl.loops.datasets import load_sequences
from megarl.loops.offline import Objective, run_offline
from megarl.losses.base import Loss
from megarl.losses.sft import sft_loss
from megarl.models.table import Architecture
from megarl.records import PackedBatch, TrainBatch
from megarl.runs.training_run import TrainingRun
from megarl.trainer.build import build_trainer
from megarl.trainer.interface import RankContext, Trainer
from megarl.trainer.passes import evaluate_loss, train_step


def run_sft(config: SftConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_offline(config, "sft", load_sequences, _objective)


def _objective(
    config: SftConfig, _run: TrainingRun, context: RankContext, architecture: Architecture
) -> SftObjective:
    return SftObjective(build_trainer(config, context, architecture, config.num_optimizer_steps))


class SftObjective(Objective[SftDataset, Loss]):
    """Train a policy on demonstrations."""

    def __init__(self, trained: Trainer) -> None:
        self.trained = trained

    def loss(self, data: SftDataset, rows: list[int], batch: TrainBatch) -> Loss:
        """See Objective."""
        return sft_loss

    def step(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """See Objective."""
        return train_step(self.trained, batches, loss).metrics

    def validate(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """See Objective."""
        return {"validation_loss": evaluate_loss(self.trained, batches, loss)["loss"]}
