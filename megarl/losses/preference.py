"""Losses over pairs of responses to one prompt; the first response is preferred.

A pair has logp_c and logp_r, the summed logprobs of the n_c and n_r tokens of its chosen and rejected
response. With rho = logp - logp of the reference, lower-case sigma the logistic function and b = beta:

    dpo     -log sigma(b (rho_c - rho_r))                             Rafailov et al. 2023, arXiv:2305.18290
    ipo     (rho_c - rho_r - 1 / (2 b))^2, b is the paper's tau       Azar et al. 2023, arXiv:2310.12036
    kto     [w_c (1 - sigma(b (rho_c - z))) + w_r (1 - sigma(b (z - rho_r)))] / 2, the mean over the two
            responses; z = max(0, mean rho of responses under other prompts), a constant to the gradient
                                                                      Ethayarajh et al. 2024, arXiv:2402.01306
    simpo   -log sigma(b (logp_c / n_c - logp_r / n_r) - gamma)       Meng et al. 2024, arXiv:2405.14734
    orpo    -b log sigma(o(logp_c / n_c) - o(logp_r / n_r)), o(l) = l - log(1 - e^l) the log odds
                                                                      Hong et al. 2024, arXiv:2403.07691

Length normalisation divides rho by n in dpo and ipo (IPO's authors do so, though the paper does not say it).
Label smoothing eps, for dpo and simpo, mixes (1 - eps) of -log sigma(x) and eps of -log sigma(-x): labels are
assumed correct with probability 1 - eps (Mitchell 2023, "A note on DPO with noisy preferences", conservative
DPO). The loss of a step is the mean over its pairs, plus sft_coef times the mean negative logprob of all its
chosen tokens (which ORPO's paper has with weight 1).

Metrics: ``reward_chosen`` and ``reward_rejected`` are b rho (b logp / n for simpo and orpo; divided by n if
the loss does so), ``reward_margin`` their difference, ``reward_accuracy`` the share of pairs with a margin
above 0, ``logps_chosen`` and ``logps_rejected`` the means of logp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from megarl.config.preference import PreferenceAlgorithmConfig
from megarl.losses.base import LossResult, LossTokens
from megarl.records import TrainBatch


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """Kind of loss and its parameters; formulas are in the module's docstring."""

    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalization: bool = False  # always on for simpo and orpo
    sft_coef: float = 0.0
    simpo_gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def options_of(algorithm: PreferenceAlgorithmConfig) -> PreferenceOptions:
    """Return the options of a valid configuration, with defaults filled in."""

    def value(given: float | None, default: float) -> float:
        return default if given is None else given

    name, normalize = algorithm.loss, algorithm.length_normalization
    return PreferenceOptions(
        loss=name,
        beta=value(algorithm.beta, 2.0 if name == "simpo" else 0.1),
        label_smoothing=algorithm.label_smoothing,
        length_normalization=name == "ipo" if normalize is None else normalize,
        sft_coef=value(algorithm.sft_coef, 1.0 if name == "orpo" else 0.0),
        simpo_gamma=value(algorithm.simpo_gamma, 1.0),
        desirable_weight=value(algorithm.desirable_weight, 1.0),
        undesirable_weight=value(algorithm.undesirable_weight, 1.0),
    )


class Responses(NamedTuple):
    """One response of each of P pairs, each field [P] float64."""

    logps: torch.Tensor  # summed logprobs of the response's tokens
    num_tokens: torch.Tensor
    ref_logps: torch.Tensor | None  # the reference's; None if the loss needs none


class PairValues(NamedTuple):
    """Loss and rewards of P pairs, each field [P]; rewards are without gradient."""

    loss: torch.Tensor
    reward_chosen: torch.Tensor
    reward_rejected: torch.Tensor


def pair_values(
    options: PreferenceOptions, chosen: Responses, rejected: Responses, kl: float = 0.0
) -> PairValues:
    """Return loss and rewards of P pairs, without the SFT term; ``kl`` is KTO's z."""
    score_chosen, score_rejected = _score(options, chosen), _score(options, rejected)
    beta, margin = options.beta, score_chosen - score_rejected
    if options.loss == "ipo":
        loss = (margin - 1 / (2 * beta)) ** 2
    elif options.loss == "kto":
        loss = (
            options.desirable_weight * torch.sigmoid(-beta * (score_chosen - kl))
            + options.undesirable_weight * torch.sigmoid(-beta * (kl - score_rejected))
        ) / 2
    elif options.loss == "orpo":
        loss = -beta * logsigmoid(_log_odds(score_chosen) - _log_odds(score_rejected))
    else:
        logits = beta * margin - (options.simpo_gamma if options.loss == "simpo" else 0.0)
        smoothing = options.label_smoothing
        loss = -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)
    return PairValues(loss, beta * score_chosen.detach(), beta * score_rejected.detach())


def _score(options: PreferenceOptions, responses: Responses) -> torch.Tensor:
    scores = responses.logps if responses.ref_logps is None else responses.logps - responses.ref_logps
    if options.length_normalization or options.loss in ("simpo", "orpo"):
        scores = scores / responses.num_tokens
    return scores


def _log_odds(logprob: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of a mean logprob below 0, exact for p near 0 and near 1."""
    return logprob - torch.log(-torch.expm1(logprob))


def num_targets(batch: TrainBatch) -> torch.Tensor:
    """Return the number of response tokens of each sequence, [S] float64."""
    return torch.from_numpy(batch.num_targets().astype(np.float64))


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """The loss of one step; sequences 2p and 2p + 1 are the chosen and the rejected one of pair p.

    num_targets and ref_logps are [2P] float64 of all the step's sequences, whichever a rank holds: the
    denominators are global. A microbatch holds whole pairs. Context-parallel ranks all compute the loss of
    the pairs they share, so each counts its share of it.
    """

    options: PreferenceOptions
    num_targets: torch.Tensor
    ref_logps: torch.Tensor | None = None
    kl: float = 0.0

    def __call__(self, tokens: LossTokens) -> LossResult:
        """Return the loss, with gradient to ``tokens.logprobs``."""
        assert tokens.slot_ids is not None
        options, sums = self.options, tokens.sequence_sums(tokens.logprobs)
        real = tokens.slot_ids >= 0  # all, or none in a dummy microbatch
        ids, sums = tokens.slot_ids[real], sums[real]
        assert torch.equal(ids[1::2], ids[0::2] + 1), "microbatches hold whole pairs"
        counts = self.num_targets.to(sums.device)
        refs = None if self.ref_logps is None else self.ref_logps.to(sums.device)

        def responses(side: int) -> Responses:
            side_ids = ids[side::2]
            return Responses(sums[side::2], counts[side_ids], None if refs is None else refs[side_ids])

        chosen, rejected = responses(0), responses(1)
        values = pair_values(options, chosen, rejected, self.kl)
        num_ranks = 1 if tokens.cp_group is None else dist.get_world_size(tokens.cp_group)
        share = 1 / (num_ranks * (len(counts) // 2))
        nll = -chosen.logps.sum() / (num_ranks * counts[0::2].sum())
        loss = share * values.loss.sum() + options.sft_coef * nll
        margins = values.reward_chosen - values.reward_rejected
        means = {
            "loss": loss,
            "reward_chosen": share * values.reward_chosen.sum(),
            "reward_rejected": share * values.reward_rejected.sum(),
            "reward_margin": share * margins.sum(),
            "reward_accuracy": share * (margins > 0).double().sum(),
            "logps_chosen": share * chosen.logps.sum(),
            "logps_rejected": share * rejected.logps.sum(),
            "weight": torch.tensor(share * len(margins), dtype=torch.float64),
        }
        if options.sft_coef:
            means["sft_loss"] = nll
        if options.loss == "kto":
            means["kl"] = means["weight"] * self.kl
        entropy = tokens.entropy.detach().double().sum()
        return LossResult(
            loss.to(tokens.logprobs.dtype),
            {name: value.detach() for name, value in means.items()},
            {"tokens": torch.tensor(tokens.entropy.numel(), dtype=torch.float64), "entropy": entropy},
        )
