"""The Megatron trainer of one rank: packed microbatches in, optimizer steps and logprobs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megarl.config.lora import LoraConfig
from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.router import RouterConfig
from megarl.errors import UserError
from megarl.losses.agreement import Agreement
from megarl.losses.base import Aggregation, Loss, LossResult, LossTokens, token_weights
from megarl.losses.preference import sequence_logps
from megarl.models.feasible import check_layout, check_router
from megarl.models.lora import check_lora
from megarl.models.table import Architecture
from megarl.ops import NumericsError
from megarl.packing.plan import CostModel
from megarl.packing.token_values import Array, assemble, take
from megarl.platform import ranges
from megarl.platform.packages import check_packages
from megarl.records import PackedBatch, Sequence
from megarl.trainer.control import gather, wait_for_devices
from megarl.trainer.megatron import checkpoint
from megarl.trainer.megatron.attention import PackedMicrobatch
from megarl.trainer.megatron.batches import count_placed, make_batches
from megarl.trainer.megatron.head import HeadShard, OnHidden, Sampler, label_logprobs, loss_tokens
from megarl.trainer.megatron.initialize import RankContext
from megarl.trainer.megatron.lora import Lora
from megarl.trainer.megatron.model import build_chunks, named_parameters
from megarl.trainer.megatron.optimizer import build_optimizer, wrap_chunks
from megarl.trainer.megatron.reduce import agreement_of, reduce_results
from megarl.trainer.megatron.reference import FrozenCopy
from megarl.trainer.megatron.routers import Routers
from megarl.trainer.megatron.sleep import Sleeper
from megarl.trainer.megatron.weights import TrainerWeights, gather_tensors
from megarl.trainer.policy import LogprobField, PendingSave, TrainStepResult, Transport
from megarl.weights.checksum import RegionQuery
from megarl.weights.hf import load_hf
from megarl.weights.plan import Owner
from megarl.weights.share import pool_parameters


class MegatronPolicy:
    """Implements :class:`megarl.trainer.policy.Policy` on Megatron-Core."""

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
    ) -> None:
        """Build this rank's part and load ``model.path``; without an optimizer it only exports.

        With ``lora`` the loaded weights stay as they are, and adapters are trained beside them.
        With check_numerics a logprob or loss input that is not finite ends every pass with a UserError
        that names its token.
        """
        router = router or RouterConfig()
        check_layout(architecture, context.parallel)
        check_packages(context.parallel)
        check_router(architecture, router)
        check_lora(architecture, lora)
        self._check_numerics = check_numerics
        self.context, self.architecture = context, architecture
        self.packing = packing or PackingConfig()
        self.device = context.platform.device
        dtype, layout = getattr(torch, model.dtype), context.layout
        self.chunks = build_chunks(architecture.spec, context.parallel, layout, dtype, self.device)
        self.params = named_parameters(self.chunks)
        self._routers = Routers(context, architecture.spec.moe, self.chunks, router)
        self.regions = architecture.trainer_regions(context.layout, context.at)
        self._model_dir = model.path
        self._load_hf(model.path)
        # The distributed optimizer brings a flat buffer of its own, for what it trains.
        if optimizer is None or not optimizer.distributed or lora is not None:
            pool_parameters(self.params)
        self.lora = None
        exported: Mapping[str, torch.Tensor] = self.params
        if lora is not None:
            self.lora = Lora(architecture, self.chunks, self.params, self.regions, lora, context.seed)
            exported = self.lora.merged_weights()
        self.weights = TrainerWeights(context, architecture, exported, self.regions)
        self._reference: FrozenCopy | None = None
        self._costs = CostModel.transformer(architecture.spec.hidden_size)
        self.num_computed_tokens = 0
        self.before_update: Callable[[], None] | None = None
        self.ddp: list[Any] = list(self.chunks)
        if optimizer is None:
            return
        self.ddp = wrap_chunks(self.chunks, context.parallel, distributed=optimizer.distributed)
        self.optimizer, self.schedule = build_optimizer(optimizer, self.ddp, dtype, total_optimizer_steps)
        self._sleeper = Sleeper(self.ddp, self.optimizer, self.device)

    # --- from sequences to microbatches -------------------------------------------------------

    def prepare(
        self,
        sequences: list[Sequence],
        aggregation: Aggregation,
        *,
        group_size: int = 1,
        fixed_length: int | None = None,
        only: list[int] | None = None,
    ) -> list[PackedBatch]:
        """See Policy. All ranks pass all sequences; each packs its own microbatches."""
        weights = token_weights(sequences, aggregation, fixed_length)
        args = (self.context, self.packing, self._costs, sequences, weights, group_size, only)
        batches, self.num_computed_tokens = make_batches(*args)
        return batches

    # --- forward and backward -----------------------------------------------------------------

    def fill_logprobs(
        self, batches: list[PackedBatch], into: LogprobField, *, temperature: float
    ) -> Agreement:
        """See Policy. The agreement is that of the filled logprobs with the rollout's, over all ranks."""
        agreement = Agreement()

        def keep(batch: PackedBatch, rows: torch.Tensor, tokens: LossTokens) -> LossResult:
            nonlocal agreement
            values = torch.zeros(batch.token_ids.shape[0], device=self.device)
            values[rows] = tokens.logprobs
            setattr(batch, into, values)
            agreement = agreement + agreement_of(tokens)
            return LossResult(tokens.logprobs.sum())

        with torch.no_grad():
            self._run(batches, keep, Sampler(temperature), forward_only=True)
        return self._reduce_agreement(agreement)

    def token_values(
        self,
        batches: list[PackedBatch],
        of: Callable[[PackedBatch], torch.Tensor],
        sequences: list[Sequence],
    ) -> list[Array]:
        """See Policy."""
        mine = [take(of(batch), batch) for batch in batches] if self._counts() else []
        parts = (part for rank in gather(mine) for part in rank)
        return assemble(parts, [len(s.token_ids) for s in sequences])

    def sequence_logps(self, sequences: list[Sequence]) -> torch.Tensor:
        """See Policy."""
        mine: dict[int, float] = {}

        def keep(_batch: PackedBatch, _rows: torch.Tensor, tokens: LossTokens) -> LossResult:
            assert tokens.slot_ids is not None
            mine.update(zip(tokens.slot_ids.tolist(), sequence_logps(tokens).tolist(), strict=True))
            return LossResult(tokens.logprobs.sum())

        with torch.no_grad():
            self._run(self.prepare(sequences, "token"), keep, Sampler(), forward_only=True)
        found = {i: value for part in gather(mine if self._counts() else {}) for i, value in part.items()}
        return torch.tensor([found[i] for i in range(len(sequences))], dtype=torch.float64)

    def evaluate_loss(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """See Policy."""
        with torch.no_grad():
            results = self._run(
                batches, lambda _batch, _rows, tokens: loss(tokens), Sampler(), forward_only=True
            )
        return self._reduce(results)

    def train_step(
        self,
        batches: list[PackedBatch],
        loss: Loss,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> TrainStepResult:
        """See Policy."""
        agreement = Agreement()

        def learn(batch: PackedBatch, rows: torch.Tensor, tokens: LossTokens) -> LossResult:
            nonlocal agreement
            agreement = agreement + agreement_of(tokens)
            return loss(tokens)

        metrics = self._optimizer_step(batches, learn, Sampler(temperature, top_k, top_p))
        return TrainStepResult(metrics, self._reduce_agreement(agreement))

    def _optimizer_step(self, batches: list[PackedBatch], use: Any, sampler: Sampler) -> dict[str, float]:
        self.wake()
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batches, use, sampler, forward_only=False)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.before_update is not None:
            self.before_update()
        with ranges.phase("optimizer"):
            success, grad_norm, _ = self.optimizer.step()
        assert success, "fp32 and bf16 steps never overflow a loss scale"
        self.schedule.step(1)
        metrics = self._reduce(results)
        metrics |= self._routers.finish_step()
        metrics |= count_placed(self.context, batches, counts=self._counts())
        metrics["grad_norm"] = float(grad_norm)
        metrics["lr"] = float(learning_rate)
        return metrics

    def _run(
        self, batches: list[PackedBatch], use: Any, sampler: Sampler, *, forward_only: bool
    ) -> list[LossResult]:
        longest = max(batch.token_ids.shape[0] for batch in batches)
        with ranges.phase("forward" if forward_only else "forward_backward"):
            return self._run_schedule(batches, use, sampler, longest, forward_only=forward_only)

    def _run_schedule(
        self, batches: list[PackedBatch], use: Any, sampler: Sampler, longest: int, *, forward_only: bool
    ) -> list[LossResult]:
        return list(
            get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, use=use, sampler=sampler),
                data_iterator=[iter(batches) for _ in self.ddp],
                model=self.ddp,
                num_microbatches=len(batches),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        )

    def _forward_step(
        self, batches: Iterator[PackedBatch], model: Any, *, use: Any, sampler: Sampler
    ) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        ranges.tick()
        packed = PackedMicrobatch.of(batch, self._routers.routing(batch))
        hidden = model(
            batch.token_ids[None], batch.position_ids[None], attention_mask=None, packed_seq_params=packed
        )
        return hidden, partial(self._head_and_loss, batch, use, sampler)

    def _head_and_loss(
        self, batch: PackedBatch, use: Any, sampler: Sampler, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LossResult]:
        no_tokens = torch.zeros((), dtype=torch.int, device=self.device)  # denominators are in the weights
        # Maybe none, in a dummy or on one of the context-parallel ranks: all take part in every collective.
        rows = batch.loss_mask.nonzero().flatten()
        head = self.head_shard()
        if isinstance(use, OnHidden):
            result = use.call(batch, rows, hidden[:, 0], head)
            return result.loss, no_tokens, result
        try:
            out = label_logprobs(
                hidden[:, 0], head, batch.labels, rows, sampler, check_numerics=self._check_numerics
            )
            result = use(batch, rows, loss_tokens(batch, rows, out, self.context.layout))
        except NumericsError as error:
            row = int(rows[error.row])
            raise UserError(
                f"debug.check_numerics: {error}; that row predicts token {int(batch.position_ids[row]) + 1} "
                f"(id {int(batch.labels[row])}) of sequence {int(batch.sequence_ids[row])} of the step"
            ) from error
        return result.loss, no_tokens, result

    def head_shard(self) -> HeadShard:
        """This rank's rows of the head (last stage)."""
        return HeadShard.of(self.chunks[-1], self.architecture.spec, self.context)

    # --- reductions over ranks ----------------------------------------------------------------

    def _reduce(self, results: list[LossResult]) -> dict[str, float]:
        """Means and maxima over microbatches and ranks; tensor ranks hold copies, so one of them counts."""
        return reduce_results(results if self._counts() else [])

    def _reduce_agreement(self, agreement: Agreement) -> Agreement:
        return sum(gather(agreement if self._counts() else Agreement()), Agreement())

    def _counts(self) -> bool:
        """Whether this rank's results are its own and not a copy of another tensor rank's."""
        return self.context.at.tensor == 0 and parallel_state.is_pipeline_last_stage()

    # --- reference ----------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """See Policy."""
        if self.lora is not None:  # the frozen weights are there already
            return
        self._finish_param_gather()
        self._reference = FrozenCopy(self.params)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """See Policy."""
        self._routers.replays = False  # the reference chooses for itself: it is a policy of its own
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
        """See Policy."""
        self._load_hf(model_dir)
        try:
            yield
        finally:
            self._load_hf(self._model_dir)

    def _load_hf(self, model_dir: str) -> None:
        load_hf(model_dir, self.architecture, self.regions, self.params)

    # --- weights ------------------------------------------------------------------------------

    def weight_owners(self, transport: Transport = "auto") -> list[Owner]:
        """See Policy. Every rank offers all it holds; the planner chooses among replicas."""
        self._finish_param_gather()
        if self.lora is not None:
            self.lora.publish()
        owners = self.weights.owners(transport)
        wait_for_devices()
        return owners

    def publish_weights(self) -> None:
        """See Policy."""
        self._finish_param_gather()
        if self.lora is not None:
            self.lora.refresh()
        wait_for_devices()

    def weight_checksums(self, queries: list[RegionQuery]) -> dict[int, int]:
        """See Policy."""
        self._finish_param_gather()
        return self.weights.checksums(queries)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Policy."""
        self.publish_weights()
        return self.weights.hf_tensors()

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Policy."""
        assert self.lora is not None, "there are adapters with lora only"
        self._finish_param_gather()
        params, regions = self.lora.adapter_tensors()
        return gather_tensors(self.context, self.lora.shapes, regions, params)

    def _finish_param_gather(self) -> None:
        """Have the last step's parameters now, not at the next forward pass."""
        if self.context.parallel.overlap_param_gather:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def sleep(self, parts: Iterable[str]) -> None:
        """See Policy."""
        self._sleeper.sleep(parts)

    def wake(self) -> None:
        """See Policy."""
        self._sleeper.wake()

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """See Policy."""
        self.wake()
        self._finish_param_gather()
        checkpoint.save(directory, self.chunks, self.optimizer if optimizer else None, self.schedule)

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """See Policy."""
        self.wake()
        self._finish_param_gather()
        part = self.optimizer if optimizer else None
        return checkpoint.start_save(directory, self.chunks, part, self.schedule)

    def load(self, directory: Path) -> bool:
        """See Policy."""
        self.wake()
        return checkpoint.load(directory, self.chunks, self.optimizer, self.schedule)
