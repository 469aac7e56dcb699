"""The trainer of a score head: of reward models, which score sequences, and critics, which score tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.router import RouterConfig
from megarl.errors import UserError
from megarl.losses.base import LossResult
from megarl.losses.reward import last_scores
from megarl.losses.scores import ScoreLoss, ScoreTokens
from megarl.models.score import SCORE, initial_score, score_architecture
from megarl.models.table import Architecture
from megarl.records import PackedBatch, Sequence
from megarl.trainer.control import gather
from megarl.trainer.megatron.head import Sampler, sharing_group
from megarl.trainer.megatron.initialize import RankContext
from megarl.trainer.megatron.policy import MegatronPolicy
from megarl.weights.hf import load_hf, safetensors_files


class MegatronScorer(MegatronPolicy):
    """A :class:`MegatronPolicy` whose last stage gives numbers; it has no logprobs.

    ``rows`` says whose: "targets" gives each target the score of the token before it, "last" each sequence
    that of its last token.
    """

    def __init__(
        self,
        context: RankContext,
        architecture: Architecture,
        model: ModelConfig,
        packing: PackingConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        total_optimizer_steps: int = 0,
        *,
        rows: Literal["targets", "last"],
        seed: int,
        check_numerics: bool = False,
        router: RouterConfig | None = None,
    ) -> None:
        """Build and load ``model.path``: a sequence classification model with one label, or a language model.

        ``architecture`` is that of the directory. A language model gets a new head drawn with ``seed``
        (``has_new_head``).
        """
        self._rows = rows
        scores = score_architecture(architecture)
        self._initial = initial_score(scores, seed)
        self.has_new_head = SCORE not in safetensors_files(Path(model.path))
        super().__init__(
            context,
            scores,
            model,
            packing,
            optimizer,
            total_optimizer_steps,
            check_numerics=check_numerics,
            router=router,
        )

    def score(self, sequences: list[Sequence]) -> torch.Tensor:
        """Forward only: the score of each sequence, [S] float64 on every rank. Pairs share microbatches."""
        assert self._rows == "last"
        mine: dict[int, float] = {}

        def keep(_batch: PackedBatch, _rows: torch.Tensor, tokens: ScoreTokens) -> LossResult:
            mine.update(zip(tokens.slot_ids.tolist(), last_scores(tokens).tolist(), strict=True))
            return LossResult(tokens.scores.sum())

        with torch.no_grad():
            self._run(self.prepare(sequences, "token", group_size=2), keep, Sampler(), forward_only=True)
        found = {i: value for part in gather(mine if self._counts() else {}) for i, value in part.items()}
        return torch.tensor([found[i] for i in range(len(sequences))], dtype=torch.float64)

    def fill_values(self, batches: list[PackedBatch]) -> None:
        """Forward only: set ``old_values`` of every microbatch to the current scores (last stage)."""
        assert self._rows == "targets"

        def keep(batch: PackedBatch, rows: torch.Tensor, tokens: ScoreTokens) -> LossResult:
            batch.old_values = torch.zeros(batch.token_ids.shape[0], device=self.device)
            batch.old_values[rows] = tokens.scores
            return LossResult(tokens.scores.sum())

        with torch.no_grad():
            self._run(batches, keep, Sampler(), forward_only=True)

    def score_step(self, batches: list[PackedBatch], loss: ScoreLoss) -> dict[str, float]:
        """Forward, backward and optimizer step of one batch; the loss's sums over all ranks."""
        return self._optimizer_step(batches, lambda _batch, _rows, tokens: loss(tokens), Sampler())

    def score_loss(self, batches: list[PackedBatch], loss: ScoreLoss) -> dict[str, float]:
        """Forward only: the loss's sums over all ranks."""
        with torch.no_grad():
            results = self._run(
                batches, lambda _batch, _rows, tokens: loss(tokens), Sampler(), forward_only=True
            )
        return self._reduce(results)

    def _load_hf(self, model_dir: str) -> None:
        load_hf(model_dir, self.architecture, self.regions, self.params, self._initial)

    def _head_and_loss(
        self, batch: PackedBatch, use: Any, sampler: Sampler, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LossResult]:
        no_tokens = torch.zeros((), dtype=torch.int, device=self.device)
        if self.context.layout.sequence_parallel:
            # Every tensor rank computes the same loss of the whole: the gradient is split, not summed.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        ids, slots = torch.unique_consecutive(batch.sequence_ids, return_inverse=True)
        rows = self._rows_of(batch, slots)
        weight = self.chunks[-1].score.weight[0]
        scores = hidden[:, 0].index_select(0, rows).float() @ weight.float()
        self._check_finite(batch, rows, scores)
        assert batch.loss_weights is not None
        assert batch.lengths is not None

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[rows]

        tokens = ScoreTokens(
            scores=scores,
            weights=batch.loss_weights[rows],
            old_values=of_rows(batch.old_values),
            returns=of_rows(batch.returns),
            slots=slots[rows],
            num_slots=len(ids),
            slot_ids=torch.full_like(ids, -1) if batch.is_dummy else ids,
            cp_group=sharing_group(batch, self.context.layout),
        )
        result: LossResult = use(batch, rows, tokens)
        return result.loss, no_tokens, result

    def _rows_of(self, batch: PackedBatch, slots: torch.Tensor) -> torch.Tensor:
        if self._rows == "targets":
            return batch.loss_mask.nonzero().flatten()
        assert batch.lengths is not None
        assert batch.prefixes is None
        last = batch.lengths.to(slots.device)[slots] - 1  # -1 in a dummy: none
        return (batch.position_ids == last).nonzero().flatten()

    def _check_finite(self, batch: PackedBatch, rows: torch.Tensor, scores: torch.Tensor) -> None:
        bad = (~torch.isfinite(scores.detach())).nonzero().flatten() if self._check_numerics else rows[:0]
        if len(bad):
            row = int(rows[int(bad[0])])
            raise UserError(
                f"debug.check_numerics: the score is {float(scores[int(bad[0])])} at token "
                f"{int(batch.position_ids[row])} of sequence {int(batch.sequence_ids[row])} of the step"
            )
