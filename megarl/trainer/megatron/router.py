"""The router of MegaRL's mixture-of-experts layers: equal to each Hugging Face model's, in fp32.

It knows its microbatch (passed in by layer.py, in recomputed forward passes too), so padding is ignored,
recorded choices can be replayed, and the load of the experts is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.models.spec import MoeSpec


@dataclass(frozen=True, slots=True)
class Routing:
    """The routers' input for a microbatch; tokens are this context-parallel rank's.

    ``share`` is the microbatch's fraction of the step's tokens, padding excluded. ``experts`` are choices to
    replay, for all MoE layers; -1 leaves the choice to the router. Without ``split`` the microbatch is this
    context-parallel rank's alone.
    """

    real: torch.Tensor  # [T] bool: not padding
    share: float
    experts: torch.Tensor | None = None  # [T, layers, k] int16
    split: bool = True

    def part(self, rank: int, size: int) -> Routing:
        """Return the tokens of one of ``size`` sequence-parallel ranks."""
        if size == 1:
            return self
        length = self.real.shape[0] // size
        rows = slice(rank * length, (rank + 1) * length)
        experts = None if self.experts is None else self.experts[rows]
        return Routing(self.real[rows], self.share, experts, self.split)


@dataclass(slots=True)
class Tally:
    """Counters of one router over the training passes of a step, on this rank."""

    load: torch.Tensor  # [E] float64: real tokens that chose each expert
    aux_loss: torch.Tensor  # [] float64, without its coefficient
    replayed: torch.Tensor  # [] float64: real tokens with choices to replay
    rerouted: torch.Tensor  # [] float64: replayed tokens for which the router chose a different set

    @classmethod
    def zero(cls, num_experts: int, device: torch.device) -> Tally:
        """Return counters at 0."""
        zeros = torch.zeros(num_experts + 3, dtype=torch.float64, device=device)
        return cls(zeros[:num_experts], zeros[-3], zeros[-2], zeros[-1])

    def flat(self) -> torch.Tensor:
        """Return [E + 3]: load, auxiliary loss, replayed, rerouted."""
        return torch.cat((self.load, torch.stack((self.aux_loss, self.replayed, self.rerouted))))


@dataclass(slots=True)
class Balance:
    """Load-balancing settings; one for all routers of a model."""

    aux_loss_coef: float = 0.0
    bias_update_rate: float = 0.0


class PolicyRouter(Router):
    """Top-k routing by softmax or sigmoid, with bias and group limits if the model has them."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **options)
        moe: MoeSpec = config.moe_spec
        self.moe, self.balance = moe, Balance()
        self.microbatch: Routing | None = None
        self.tally = Tally.zero(moe.num_experts, self.weight.device)
        self.expert_bias: torch.nn.Parameter | None = None
        if moe.router_bias:  # always fp32; updated by its own rule, not by gradients
            bias = torch.zeros(moe.num_experts, dtype=torch.float32, device=self.weight.device)
            self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)

    @property
    def number(self) -> int:
        """Index among the model's MoE layers, from 0."""
        return self.moe.layers.index(self.layer_number - 1)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input [T, 1, H] -> weights of the experts [T, E], 0 if not chosen, and the choice as bool."""
        return self.routing(self.gating(input).view(-1, self.moe.num_experts))

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See forward; takes the logits [T, E] in fp32."""
        own = choose_experts(logits, self.moe, self.expert_bias)
        chosen, routing = own, None
        if self.microbatch is not None:
            routing = self.microbatch
            if self.config.sequence_parallel:
                routing = routing.part(self.tp_group.rank(), self.tp_group.size())
            if routing.experts is not None:
                chosen = replay(own, routing.experts[:, self.number])
        weights = expert_weights(logits, chosen, self.moe)
        probs = torch.zeros_like(logits).scatter(1, chosen, weights)
        choice = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        if routing is not None and torch.is_grad_enabled():  # once per microbatch, recomputed or not
            probs = self._measure_load(logits, own, chosen, choice, routing, probs)
        return probs, choice

    def _measure_load(
        self,
        logits: torch.Tensor,
        own: torch.Tensor,
        chosen: torch.Tensor,
        choice: torch.Tensor,
        routing: Routing,
        probs: torch.Tensor,
    ) -> torch.Tensor:
        """Update the counters, and tie the load-balancing loss to ``probs`` to include it in backward."""
        real, tally = routing.real, self.tally
        load = choice[real].sum(0, dtype=torch.float64)
        tally.load += load
        if routing.experts is not None:
            given = real & (routing.experts[:, self.number, 0] >= 0)
            tally.replayed += given.sum()
            tally.rerouted += (given & (own != chosen).any(-1)).sum()
        if self.balance.aux_loss_coef == 0:
            return probs
        scores = logits[real].softmax(-1)
        if self.moe.score == "sigmoid":
            scores = logits[real].sigmoid()
            scores = scores / scores.sum(-1, keepdim=True)
        load = load.to(torch.float32)
        dist.all_reduce(load, group=self.tp_cp_group if routing.split else self.tp_group)
        loss = balance_loss(scores, load, self.moe.experts_per_token) * routing.share
        tally.aux_loss += loss.detach()
        coef = self.balance.aux_loss_coef / len(self.moe.layers)
        tied: torch.Tensor = _TieLoss.apply(probs, loss * coef)
        return tied

    def _apply(self, fn: Any, recurse: bool = True) -> PolicyRouter:
        """Keep the bias in fp32 when the model is converted."""
        before = self.expert_bias.data.clone() if self.expert_bias is not None else None
        super()._apply(fn, recurse)
        if self.expert_bias is not None and before is not None:
            self.expert_bias.data = before.to(self.expert_bias.device)
        self.tally = Tally.zero(self.moe.num_experts, self.weight.device)
        return self


@torch.no_grad()
def choose_experts(logits: torch.Tensor, moe: MoeSpec, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Choose the experts of each token: logits [T, E] fp32 -> [T, k] int64, ascending.

    With groups (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) only experts of the ``top_groups`` groups with
    the greatest sum of two best scores are eligible. The bias affects the choice alone.
    """
    scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(-1)
    if bias is not None:
        scores = scores + bias
    if moe.num_groups > 1:
        groups = scores.unflatten(-1, (moe.num_groups, -1))
        strength = groups.topk(2, dim=-1).values.sum(-1)
        eligible = torch.zeros_like(strength, dtype=torch.bool)
        eligible.scatter_(1, strength.topk(moe.top_groups, dim=-1).indices, True)
        scores = groups.masked_fill(~eligible[..., None], -torch.inf).flatten(1)
    return scores.topk(moe.experts_per_token, dim=-1).indices.sort(-1).values


@torch.no_grad()
def replay(own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Use ``given`` [T, k] instead of the router's own choice, except where it is -1."""
    given = (
        given.to(own.dtype).sort(-1).values
    )  # weights are normalised in this order, which the bits depend on
    return torch.where(given >= 0, given, own)


def expert_weights(logits: torch.Tensor, chosen: torch.Tensor, moe: MoeSpec) -> torch.Tensor:
    """Return the weights [T, k] of the ``chosen`` experts' outputs, with gradient."""
    if moe.score == "sigmoid":
        weights = logits.gather(1, chosen).sigmoid()
        if moe.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif moe.normalize_top_k:  # softmax over all, normalised over the chosen, is the softmax over the chosen
        weights = logits.gather(1, chosen).softmax(-1)
    else:
        weights = logits.softmax(-1).gather(1, chosen)
    return weights * moe.scaling_factor if moe.scaling_factor != 1 else weights


def balance_loss(scores: torch.Tensor, load: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4), in Hugging Face's form.

    E * sum_e (share of the tokens that chose e) * (mean score of e); at least top_k. ``scores`` [T, E] are
    this rank's tokens, ``load`` [E] counts those of all ranks that share the microbatch: the loss is the sum
    of those ranks' results.
    """
    num_tokens = load.sum() / top_k
    shares = load / num_tokens.clamp(min=1)
    return load.shape[0] * (shares * scores.sum(0)).sum() / num_tokens.clamp(min=1)


class _TieLoss(torch.autograd.Function):
    """Pass a tensor through; in backward, give the loss tied to it a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, through: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.new_ones(())
