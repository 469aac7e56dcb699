"""Expert balancing: routing metrics of a rank's model chunks, and the update rule of the routers' bias."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from megarl.batching.expert_routing import real_tokens
from megarl.cluster.collectives import gather
from megarl.config.router import RouterConfig
from megarl.models.spec import MoeSpec
from megarl.records import PackedBatch
from megarl.trainer.interface import RankContext
from megarl.trainer.megatron.router import Balance, PolicyRouter, Routing, Tally


class Routers:
    """All routers of one rank's model. A dense model has none."""

    def __init__(
        self,
        context: RankContext,
        moe: MoeSpec | None,
        chunks: Iterable[torch.nn.Module],
        config: RouterConfig,
    ) -> None:
        self._context, self._moe = context, moe
        self.replays = True
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._routers = [module for module in modules if isinstance(module, PolicyRouter)]
        self._dispatchers = [module.token_dispatcher for module in modules if isinstance(module, MoELayer)]
        if moe is None:
            return
        coef = moe.aux_loss_coef if config.aux_loss_coef is None else config.aux_loss_coef
        self._balance = Balance(coef, config.bias_update_rate)
        for router in self._routers:
            router.balance = self._balance

    def routing(self, batch: PackedBatch) -> Routing | None:
        """Build the routers' input for a microbatch, with the experts to replay, if any."""
        if self._moe is None:
            return None
        at, layout = self._context.at, self._context.layout
        real = real_tokens(batch, at.context, layout.context) if batch.split else real_tokens(batch)
        return Routing(real, batch.token_share, batch.experts if self.replays else None, batch.split)

    def finish_pass(self) -> None:
        """Drop what Megatron's dispatchers keep of the last microbatch.

        Its graph holds the parameters' hooks, and they the whole model, through C++, where Python's collector
        does not look: a model that has been trained would never be freed.
        """
        for dispatcher in self._dispatchers:
            for name, value in vars(dispatcher).items():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    setattr(dispatcher, name, None)

    def finish_step(self) -> dict[str, float]:
        """Finish the optimizer's step: update the bias, reset the counters, and return their metrics.

        Every rank calls it. Metrics cover all layers and ranks.
        """
        if self._moe is None:
            return {}
        totals = {}
        if self._routers:
            counts = torch.stack([router.tally.flat() for router in self._routers])
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(counts, group=group)
            for router, row in zip(self._routers, counts, strict=True):
                self._move_bias(router, row[:-3])
                router.tally = Tally.zero(self._moe.num_experts, row.device)
                totals[router.number] = row.tolist()
        layers = {number: row for part in gather(totals) for number, row in part.items()}
        return _figures(layers, self._balance)

    def _move_bias(self, router: PolicyRouter, load: torch.Tensor) -> None:
        """Raise the bias of experts below the mean load, lower it above (arXiv:2408.15664, algorithm 1)."""
        if router.expert_bias is not None and self._balance.bias_update_rate:
            step = (load.mean() - load).sign().to(router.expert_bias.dtype)
            with torch.no_grad():
                router.expert_bias.add_(step, alpha=self._balance.bias_update_rate)


def _figures(layers: dict[int, list[float]], balance: Balance) -> dict[str, float]:
    rows = [layers[number] for number in sorted(layers)]
    loads = [row[:-3] for row in rows]
    highest = [max(load) * len(load) / total for load in loads if (total := sum(load))]
    values = {"expert_load_max": sum(highest) / len(highest)} if highest else {}
    if balance.aux_loss_coef:
        values["router_aux_loss"] = sum(row[-3] for row in rows) / len(rows)
    if replayed := sum(row[-2] for row in rows):
        values["router_replay_rerouted"] = sum(row[-1] for row in rows) / replayed
    return values
