"""The Megatron trainer of one rank: passes over packed microbatches, optimizer steps, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megarl.batching.microbatch_plan import CostModel
from megarl.batching.rank_microbatches import BatchMaker
from megarl.config.lora import LoraConfig
from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.router import RouterConfig
from megarl.losses.base import LossResult
from megarl.losses.hidden import Head
from megarl.models.layout_checks import check_layout, check_router
from megarl.models.lora import check_lora
from megarl.models.table import Architecture
from megarl.platform import ranges
from megarl.platform.packages import check_packages
from megarl.records import PackedBatch
from megarl.trainer.interface import PendingSave, RankContext
from megarl.trainer.megatron import checkpoint
from megarl.trainer.megatron.attention import PackedMicrobatch
from megarl.trainer.megatron.expert_balancing import Routers
from megarl.trainer.megatron.hidden import head_of, rows_for_head, sharing_group, whole_rows
from megarl.trainer.megatron.lora import Lora
from megarl.trainer.megatron.model import build_chunks, is_first_replica, named_parameters
from megarl.trainer.megatron.optimizer import build_optimizer, wrap_chunks
from megarl.trainer.megatron.reference import FrozenCopy
from megarl.trainer.megatron.sleep import Sleeper
from megarl.trainer.memory import parts_in_memory
from megarl.trainer.outputs import Output, Read
from megarl.trainer.reduce import reduce_results, weights_report
from megarl.trainer.weights import TrainerWeights
from megarl.weights.hf import load_hf
from megarl.weights.shared_storage import pool_parameters


class MegatronTrainer:
    """Implements :class:`megarl.trainer.interface.Trainer` on Megatron-Core."""

    def __init__(
        self,
        context: RankContext,
        architecture: Architecture,
        model: ModelConfig,
        packing: PackingConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        total_optimizer_steps: int = 0,
        *,
        check_numerics: bool = False,
        router: RouterConfig | None = None,
        lora: LoraConfig | None = None,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Build this rank's part and load ``model.path``; without an optimizer it only computes and exports.

        With ``lora`` the loaded weights are frozen, and adapters are trained. With check_numerics, a
        non-finite logprob or loss input ends the pass with a UserError that names its token. ``initial`` has
        whole tensors, by their Hugging Face names, that the directory may lack.
        """
        router = router or RouterConfig()
        check_layout(architecture, context.parallel)
        check_packages(context.parallel)
        check_router(architecture, router)
        check_lora(architecture, lora)
        self._check_numerics = check_numerics
        self.context, self.architecture = context, architecture
        self.device = context.platform.device
        dtype, layout = getattr(torch, model.dtype), context.layout
        self.chunks = build_chunks(architecture.spec, context.parallel, layout, dtype, self.device)
        self.params = named_parameters(self.chunks)
        self._routers = Routers(context, architecture.spec.moe, self.chunks, router)
        self.regions = architecture.trainer_regions(context.layout, context.at)
        self._model_dir, self._initial = model.path, initial
        self._load_hf(model.path)
        # The distributed optimizer allocates its own flat buffer for trained parameters.
        if optimizer is None or not optimizer.distributed or lora is not None:
            pool_parameters(self.params)
        self.lora = None
        if lora is not None:
            self.lora = Lora(architecture, self.chunks, self.params, self.regions, lora, context.seed)
        self.weights = TrainerWeights(
            context,
            architecture,
            self.params,
            self.regions,
            self.lora,
            self._finish_param_gather,
            lambda param: is_first_replica(param, context.at),
        )
        self._reference: FrozenCopy | None = None
        self.batch_maker = BatchMaker(
            context.layout,
            context.rank,
            self.device,
            packing or PackingConfig(),
            CostModel.transformer(architecture.spec.hidden_size),
            context.parallel.context_split_from,
        )
        self.prepare = self.batch_maker.prepare
        self.before_update: Callable[[], None] | None = None
        self.ddp: list[Any] = list(self.chunks)
        if optimizer is None:
            return
        self.ddp = wrap_chunks(self.chunks, context.parallel, distributed=optimizer.distributed)
        self.optimizer, self.schedule = build_optimizer(optimizer, self.ddp, dtype, total_optimizer_steps)
        self._sleeper = Sleeper(self.ddp, self.optimizer, self.device)

    # --- forward and backward -----------------------------------------------------------------

    def run(self, batches: list[PackedBatch], fn: Read, *, grad: bool = False) -> list[LossResult]:
        """See Trainer."""
        longest = max(batch.token_ids.shape[0] for batch in batches)
        with ranges.phase("forward_backward" if grad else "forward"), torch.set_grad_enabled(grad):
            results = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, fn=fn),
                data_iterator=[iter(batches) for _ in self.ddp],
                model=self.ddp,
                num_microbatches=len(batches),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=not grad,
            )
        self._routers.finish_pass()
        return [result for result in results if result is not None] if self.context.has_results else []

    def optimizer_step(
        self, batches: list[PackedBatch], fn: Callable[[Output], LossResult]
    ) -> dict[str, float]:
        """See Trainer."""
        self.wake()
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self.run(batches, fn, grad=True)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.before_update is not None:
            self.before_update()
        with ranges.phase("optimizer"):
            success, grad_norm, _ = self.optimizer.step()
        assert success, "fp32 and bf16 steps never overflow a loss scale"
        self.schedule.step(1)
        trained = (param for group in self.optimizer.param_groups for param in group["params"])
        metrics = reduce_results([*results, weights_report(trained)])
        metrics |= self._routers.finish_step()
        metrics["grad_norm"] = float(grad_norm)
        metrics["lr"] = float(learning_rate)
        return metrics

    def _forward_step(
        self, batches: Iterator[PackedBatch], model: Any, *, fn: Read
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, LossResult | None]]]:
        batch = next(batches)
        ranges.tick()
        packed = PackedMicrobatch.of(batch, self._routers.routing(batch))
        hidden = model(
            batch.token_ids[None], batch.position_ids[None], attention_mask=None, packed_seq_params=packed
        )
        return hidden, partial(self._read, batch, fn)

    def _read(
        self, batch: PackedBatch, fn: Read, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LossResult | None]:
        """Return loss, token count and result of a microbatch on the last stage, for Megatron's schedule.

        A dummy microbatch, or one context-parallel rank, may have no rows; all take part in every collective.
        """
        flat, layout = hidden[:, 0], self.context.layout
        last: Any = self.chunks[-1]
        spec = self.architecture.spec

        def head() -> Head:
            return head_of(last, spec, self.context)

        output = Output(
            batch,
            hidden=lambda rows: rows_for_head(flat, rows, layout),
            whole_hidden=lambda rows: whole_rows(flat, rows, layout),
            head=head,
            lasting_head=head,
            score=last.score.weight[0] if spec.score_head else None,
            sharing_group=sharing_group(batch, layout),
            check_numerics=self._check_numerics,
        )
        result = output.read(fn)
        loss = hidden.new_zeros(()) if result is None else result.loss
        no_tokens = torch.zeros((), dtype=torch.int, device=self.device)  # the weights have the denominators
        return loss, no_tokens, result

    # --- reference ----------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """See Trainer."""
        if self.lora is not None:  # the frozen weights are the reference
            return
        self._finish_param_gather()
        self._reference = FrozenCopy(self.params)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """See Trainer."""
        self._routers.replays = False  # the reference is another policy and chooses its own experts
        self._finish_param_gather()
        try:
            if self.lora is not None:
                inside = self.lora.off()
            else:
                assert self._reference is not None, "keep_reference() first"
                inside = self._reference.in_place_of(self.params)
            with inside:
                yield
        finally:
            self._routers.replays = True

    @contextmanager
    def weights_of(self, model_dir: str) -> Iterator[None]:
        """See Trainer."""
        self._load_hf(model_dir)
        try:
            yield
        finally:
            self._load_hf(self._model_dir)

    def _load_hf(self, model_dir: str) -> None:
        load_hf(model_dir, self.architecture, self.regions, self.params, self._initial)

    # --- memory -------------------------------------------------------------------------------

    def _finish_param_gather(self) -> None:
        """Complete the last step's parameters now rather than at the next forward pass."""
        if self.context.parallel.overlap_param_gather:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def sleep(self, parts: Iterable[str]) -> None:
        """See Trainer."""
        self._sleeper.sleep(parts)

    def wake(self) -> None:
        """See Trainer."""
        self._sleeper.wake()

    def memory_bytes(self) -> dict[str, int]:
        """See Trainer."""
        params = list(self.params.values())
        trained = [param for chunk in self.ddp for param in chunk.parameters()]
        gradients = (getattr(param, name, None) for param in trained for name in ("main_grad", "grad"))
        return parts_in_memory(
            self.device,
            parameters=[*params, *trained],
            gradients=[gradient for gradient in gradients if gradient is not None],
            optimizer=self._sleeper.optimizer_tensors(),
            reference=(self._reference or {}).values(),
            merged=() if self.lora is None else self.lora.published(),
        )

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """See Trainer."""
        self.wake()
        self._finish_param_gather()
        checkpoint.save(directory, self.chunks, self.optimizer if optimizer else None, self.schedule)

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """See Trainer."""
        self.wake()
        self._finish_param_gather()
        part = self.optimizer if optimizer else None
        return checkpoint.start_save(directory, self.chunks, part, self.schedule)

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """See Trainer."""
        self.wake()
        part = self.optimizer if optimizer else None
        return checkpoint.load(directory, self.chunks, part, self.schedule)
