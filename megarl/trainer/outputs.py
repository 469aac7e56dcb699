"""The last stage's output for one microbatch, for any backend.

Logits of the whole vocabulary are never stored: each method computes only what it needs of the rows that have
a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megarl.errors import UserError
from megarl.losses.base import LossResult, LossTokens
from megarl.losses.hidden import Head, HiddenTokens
from megarl.losses.score_inputs import ScoreTokens
from megarl.ops import NumericsError, linear_support_min_logit, linear_token_logprob
from megarl.records import PackedBatch
from megarl.trainer.capped_logprob import capped_token_logprob

Read = Callable[["Output"], LossResult | None]
"""The function of a pass: returns a microbatch's loss and metrics, or None if it only reads."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Sampling parameters; logprobs are of the same distribution. top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        """True if some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class Output:
    """One microbatch at the end of its forward pass, on a rank of the last stage.

    Args:
        batch: the microbatch.
        hidden: hidden states [N, H] of some rows [N], for a function that every rank of the head's group
            computes with its own rows of the vocabulary (gradients are summed over the group).
        whole_hidden: the same for a function that every rank of the group computes equally.
        head: of a language model.
        lasting_head: the same in memory that the model does not free or change after the pass.
        score: [H] of a score head, in a model that has one.
        sharing_group: the ranks that share this microbatch's sequences; None if they are whole here.
        check_numerics: raise an error for a logprob or score that is not finite.
        softcap: bound of the logits, cap * tanh(logit / cap); None: no bound.
    """

    batch: PackedBatch
    hidden: Callable[[torch.Tensor], torch.Tensor]
    whole_hidden: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[], Head]
    lasting_head: Callable[[], Head]
    score: torch.Tensor | None
    sharing_group: dist.ProcessGroup | None
    check_numerics: bool
    softcap: float | None = None

    def read(self, fn: Read) -> LossResult | None:
        """Call ``fn`` on this output and return its result.

        Raises:
            UserError: with check_numerics, a logit that is not finite; it names the token.
        """
        try:
            return fn(self)
        except NumericsError as error:
            batch, row = self.batch, int(self.targets()[error.row])
            raise UserError(
                f"debug.check_numerics: {error}; that row predicts token {int(batch.position_ids[row]) + 1} "
                f"(id {int(batch.labels[row])}) of sequence {int(batch.sequence_ids[row])} of the step"
            ) from error

    def targets(self) -> torch.Tensor:
        """Return the rows [N] int64 that have a loss, ascending; maybe none, on any rank."""
        return self.batch.loss_mask.nonzero().flatten()

    def at_targets(self, *, lasting: bool = False) -> HiddenTokens:
        """Return the hidden states of the targets, for a loss over the whole vocabulary.

        With ``lasting`` they can be used after the pass, as long as the weights stay.

        Raises:
            UserError: logits are not the product of hidden states and head alone.
        """
        if self.softcap is not None:
            raise UserError("model.path: losses over the whole vocabulary know no final_logit_softcapping")
        return self._at_targets(lasting)

    def _at_targets(self, lasting: bool = False) -> HiddenTokens:
        rows = self.targets()
        return HiddenTokens(rows, self.hidden(rows), self.lasting_head() if lasting else self.head())

    def logprobs(self, sampler: Sampler = Sampler()) -> LossTokens:
        """Return the targets' logprob and entropy [N] float32 under ``sampler``, with a loss's other fields.

        A truncating sampler takes another pass over the logits, for its support, without gradient.
        """
        at, batch = self._at_targets(), self.batch
        support = None
        if sampler.truncates and self.softcap is not None:
            raise UserError("top_k and top_p: training with them knows no final_logit_softcapping")
        if sampler.truncates:
            support = linear_support_min_logit(
                at.hidden,
                at.head.weight,
                temperature=sampler.temperature,
                top_k=sampler.top_k,
                top_p=sampler.top_p,
                tp_group=at.head.group,
            )
        labels = batch.labels[at.rows]
        if self.softcap is not None:
            logprob, entropy = capped_token_logprob(
                at.hidden, at.head, labels, cap=self.softcap, temperature=sampler.temperature
            )
        else:
            out = linear_token_logprob(
                at.hidden,
                at.head.weight,
                labels,
                temperature=sampler.temperature,
                vocab_start=at.head.vocab_start,
                tp_group=at.head.group,
                min_logit=support,
                check_numerics=self.check_numerics,
            )
            logprob, entropy = out.logprob, out.entropy
        assert batch.loss_weights is not None
        ids, slots = self._slots()

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[at.rows]

        return LossTokens(
            logprobs=logprob,
            entropy=entropy,
            weights=batch.loss_weights[at.rows],
            labels=labels,
            sequence_ids=batch.sequence_ids[at.rows],
            advantages=of_rows(batch.advantages),
            old_logprobs=of_rows(batch.old_logprobs),
            ref_logprobs=of_rows(batch.ref_logprobs),
            rollout_logprobs=of_rows(batch.rollout_logprobs),
            stale=of_rows(batch.stale),
            nll_weights=of_rows(batch.nll_weights),
            slots=slots[at.rows],
            num_slots=len(ids),
            slot_ids=torch.full_like(ids, -1) if batch.is_dummy else ids,
            cp_group=self.sharing_group,
            rows=at.rows,
        )

    def scores(self, of: Literal["targets", "last"]) -> ScoreTokens:
        """Return the score head's output, float32: at the token before each target, or each sequence's last.

        Raises:
            UserError: with check_numerics, a score is not finite.
        """
        assert self.score is not None, "the model has no score head"
        batch = self.batch
        ids, slots = self._slots()
        rows = self.targets() if of == "targets" else self._last_rows(slots)
        scores = self.whole_hidden(rows).float() @ self.score.float()
        self._check_scores(rows, scores)
        assert batch.loss_weights is not None

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[rows]

        return ScoreTokens(
            scores=scores,
            weights=batch.loss_weights[rows],
            old_values=of_rows(batch.old_values),
            returns=of_rows(batch.returns),
            slots=slots[rows],
            num_slots=len(ids),
            slot_ids=torch.full_like(ids, -1) if batch.is_dummy else ids,
            cp_group=self.sharing_group,
            rows=rows,
        )

    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sequence ids [S] of the slots, and every token's slot [T].

        Slots cover all tokens, not only those with a loss, so context-parallel ranks agree on them. A shared
        prefix, which has no targets, belongs to the slot of its first branch.
        """
        ids, slots = torch.unique_consecutive(self.batch.sequence_ids, return_inverse=True)
        return ids, slots

    def _last_rows(self, slots: torch.Tensor) -> torch.Tensor:
        assert self.batch.lengths is not None
        assert self.batch.prefixes is None
        last = self.batch.lengths.to(slots.device)[slots] - 1  # -1 in a dummy: none
        return (self.batch.position_ids == last).nonzero().flatten()

    def _check_scores(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        bad = (~torch.isfinite(scores.detach())).nonzero().flatten() if self.check_numerics else rows[:0]
        if len(bad):
            row, score = int(rows[int(bad[0])]), float(scores[int(bad[0])])
            raise UserError(
                f"debug.check_numerics: the score is {score} at token {int(self.batch.position_ids[row])} of "
                f"sequence {int(self.batch.sequence_ids[row])} of the step"
            )
