"""The reward model's loss on pairs of responses; the first response is preferred.

    -log sigma(r_c - r_r) + c (r_c + r_r)^2

r_c and r_r are the scores of the last tokens, lower-case sigma the logistic function. The first term is the
likelihood of the preference under the Bradley-Terry model (Ouyang et al. 2022, arXiv:2203.02155). The second,
with a small c = center_coef, keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244), which
differences alone do not determine. The loss of a step is the mean over its pairs.

Metrics are means over pairs: ``reward_accuracy`` is the share of pairs with r_c > r_r, ``reward_margin`` the
mean r_c - r_r, ``center_loss`` the mean (r_c + r_r)^2 whether or not it is in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from megarl.losses.all_reduce import all_reduce_sum
from megarl.losses.base import LossResult
from megarl.losses.score_inputs import ScoreTokens


def last_scores(tokens: ScoreTokens) -> torch.Tensor:
    """Return every slot's score [num_slots] float64, whichever context-parallel rank holds it."""
    scores = tokens.scores.new_zeros(tokens.num_slots, dtype=torch.float64)
    scores = scores.index_copy(0, tokens.slots, tokens.scores.double())
    return scores if tokens.cp_group is None else all_reduce_sum(scores, tokens.cp_group)


@dataclass(frozen=True, slots=True)
class RewardLoss:
    """The loss of one step of ``num_pairs`` pairs over all ranks: sequences 2p and 2p + 1 are pair p.

    A microbatch holds whole pairs; context-parallel ranks each count their share of the pairs they hold.
    """

    num_pairs: int
    center_coef: float = 0.0

    def __call__(self, tokens: ScoreTokens) -> LossResult:
        """Return the loss, with gradient to ``tokens.scores``."""
        real = tokens.slot_ids >= 0  # all, or none in a dummy microbatch
        ids, scores = tokens.slot_ids[real], last_scores(tokens)[real]
        assert torch.equal(ids[1::2], ids[0::2] + 1), "microbatches hold whole pairs"
        chosen, rejected = scores[0::2], scores[1::2]
        num_ranks = 1 if tokens.cp_group is None else dist.get_world_size(tokens.cp_group)
        share = 1 / (num_ranks * self.num_pairs)
        margins = chosen - rejected
        loss, center = -share * logsigmoid(margins).sum(), share * ((chosen + rejected) ** 2).sum()
        if self.center_coef:
            loss = loss + self.center_coef * center
        means = {
            "loss": loss,
            "reward_chosen": share * chosen.sum(),
            "reward_rejected": share * rejected.sum(),
            "reward_margin": share * margins.sum(),
            "reward_accuracy": share * (margins > 0).double().sum(),
            "center_loss": center,
            "weight": torch.tensor(share * len(margins), dtype=torch.float64),
        }
        return LossResult(loss.float(), {name: value.detach() for name, value in means.items()})
