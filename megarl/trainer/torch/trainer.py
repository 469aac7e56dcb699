"""The torch backend's trainer of one rank: passes over packed microbatches, optimizer steps, checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megarl.batching.microbatch_plan import CostModel
from megarl.batching.rank_microbatches import BatchMaker
from megarl.config.lora import LoraConfig
from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.router import RouterConfig
from megarl.errors import UserError
from megarl.losses.base import LossResult
from megarl.losses.hidden import Head
from megarl.models.table import Architecture, Region
from megarl.models.transformers_regions import transformers_regions
from megarl.platform import ranges
from megarl.platform.memory import storage_bytes
from megarl.records import PackedBatch
from megarl.trainer import random_state
from megarl.trainer.host_copies import HostCopies
from megarl.trainer.interface import PendingSave, RankContext
from megarl.trainer.memory import parts_in_memory
from megarl.trainer.outputs import Output, Read
from megarl.trainer.reduce import reduce_results, weights_report
from megarl.trainer.torch import attention, checkpoint
from megarl.trainer.torch.collectives import copy_to_ranks, gather
from megarl.trainer.torch.lora import TorchLora, inject, is_adapter, model_name
from megarl.trainer.torch.model import at_head, build_decoder, check_longest
from megarl.trainer.torch.optimizer import Optimizer
from megarl.trainer.torch.sharded import Sharded, local
from megarl.trainer.torch.shards import local_regions
from megarl.trainer.weights import TrainerWeights
from megarl.weights.hf import load_hf, safetensors_files


class TorchTrainer:
    """Implements :class:`megarl.trainer.interface.Trainer` on PyTorch's own parallelism."""

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

        Arguments are those of the Megatron backend's trainer; what this one lacks the configuration refuses.
        """
        self._check_numerics = check_numerics
        self.context, self.architecture = context, architecture
        self.device = context.platform.device
        recompute = context.parallel.activation_recompute
        decoder = build_decoder(
            model,
            getattr(torch, model.dtype),
            score_head=architecture.spec.score_head,
            recompute=recompute if optimizer is not None else "off",
        )
        if lora is not None:
            inject(decoder, architecture, lora)
        self.model = Sharded(context, decoder)
        self.decoder, self.parts = decoder, self.model.parts
        names = {*safetensors_files(Path(model.path)), *(initial or {})}
        self.regions = local_regions(self._regions_of_whole(names), self.parts)
        self._model_dir, self._initial = model.path, initial
        self._load_hf(model.path)
        self.lora = None
        if lora is not None:
            self.lora = TorchLora(self.model, architecture, lora, context.seed)
        self.weights = TrainerWeights(
            context,
            architecture,
            self.model.tensors,
            self.regions,
            self.lora,
            lambda: None,
            lambda param: self.parts[param].first,
        )
        packing = packing or PackingConfig()
        positions = architecture.spec.max_position_embeddings
        check_longest(
            decoder, packing.max_sequence_length or min(positions, packing.max_tokens_per_microbatch)
        )
        if decoder.rows and context.layout.sequence_parallel:
            raise UserError(f"parallel.sequence_parallel: {decoder.family} has a state along its tokens")
        if decoder.rows:  # a state cannot go on from another row's
            packing = packing.model_copy(update={"share_prefix": "off"})
        self.batch_maker = BatchMaker(
            context.layout,
            context.rank,
            self.device,
            packing,
            CostModel.transformer(architecture.spec.hidden_size),
            context.parallel.context_split_from,
        )
        self.prepare = self.batch_maker.prepare
        self.before_update: Callable[[], None] | None = None
        self._reference: dict[str, torch.Tensor] | None = None
        self._reduces_each = context.trainer.reduce_each_microbatch and self.model.mesh is not None
        self._head_copy: weakref.ref[torch.Tensor] | None = None  # freed with the states that need it
        self._main_grads: dict[str, torch.Tensor] = {}
        self._trained: list[str] = []
        self._gradient_bytes = 0  # of the last step, which has freed them
        if optimizer is None:
            decoder.requires_grad_(False)
            return
        self._trained = [name for name, param in self.model.params.items() if param.requires_grad]
        self._accumulate_in_fp32()
        self.optimizer = Optimizer(
            optimizer,
            {name: self.model.tensors[name] for name in self._trained},
            self.parts,
            total_optimizer_steps,
            self.device,
        )
        self._copies, self._asleep = HostCopies(self.device), False

    def _regions_of_whole(self, names: set[str]) -> list[Region]:
        """Return each whole parameter's regions in a checkpoint's tensors ``names``."""
        params = {model_name(name): name for name in self.parts if not is_adapter(name)}
        shapes = {name: self.parts[param].whole for name, param in params.items()}
        regions = transformers_regions(self.decoder.lm, shapes, names)
        return [replace(region, param=params[region.param]) for region in regions]

    # --- forward and backward -----------------------------------------------------------------

    def run(self, batches: list[PackedBatch], fn: Read, *, grad: bool = False) -> list[LossResult]:
        """See Trainer."""
        results = []
        with ranges.phase("forward_backward" if grad else "forward"), torch.set_grad_enabled(grad):
            for number, batch in enumerate(batches):
                ranges.tick()
                last = number == len(batches) - 1
                if grad:
                    self.model.begin_backward(reduce=last or self._reduces_each)
                with attention.of_row(attention.row_of(batch)):
                    hidden = self.decoder(batch)
                    hidden = hidden.view(-1, hidden.shape[-1])
                    result = self._output(batch, hidden).read(fn)
                    if grad:
                        self._backward(hidden, result)
                        if self._reduces_each and not last:
                            self._add_reduced()
                if result is not None:
                    results.append(result)
            self.model.end_pass()
        return results if self.context.has_results else []

    def optimizer_step(
        self, batches: list[PackedBatch], fn: Callable[[Output], LossResult]
    ) -> dict[str, float]:
        """See Trainer."""
        self.wake()
        self._zero_gradients()
        self._head_copy = None
        results = self.run(batches, fn, grad=True)
        learning_rate = self.optimizer.learning_rate
        if self.before_update is not None:
            self.before_update()
        with ranges.phase("optimizer"):
            gradients = self._take_gradients()
            self._gradient_bytes = storage_bytes(gradients.values(), self.device.type)
            norm = self.optimizer.norm(gradients)
            self.optimizer.step(gradients, norm)
        trained = (self.model.tensors[name] for name in self._trained)
        metrics = reduce_results([*results, weights_report(trained)])
        return metrics | {"grad_norm": norm, "lr": learning_rate}

    def _backward(self, hidden: torch.Tensor, result: LossResult | None) -> None:
        """Of a microbatch's loss; where it has none the ranks still exchange what they exchange."""
        loss = hidden.sum() * 0.0 if result is None or not result.loss.requires_grad else result.loss
        loss.backward()
        if result is not None:
            result.loss = result.loss.detach()

    def _output(self, batch: PackedBatch, hidden: torch.Tensor) -> Output:
        """Return what a loss may read of a microbatch; a dummy has no rows, but joins every collective."""
        group, decoder = self.model.groups.tensor, self.decoder
        sequence = self.context.layout.sequence_parallel
        weight, bias = None, None
        head = None
        if not self.architecture.spec.score_head:
            weight, bias = decoder.head_parameters()
            rows = -(-decoder.lm.config.vocab_size // self.model.groups.tensor_size)
            head = Head(weight, self.context.at.tensor * rows, group)

        def rows_for_head(rows: torch.Tensor) -> torch.Tensor:
            if group is None:
                found = hidden.index_select(0, rows)
            elif sequence:
                found = gather(hidden, 0, group, partial=True).index_select(0, rows)
            else:
                found = copy_to_ranks(hidden.index_select(0, rows), group)
            assert head is not None
            return at_head(found, head, bias, decoder.logit_scale)[0]

        def whole_rows(rows: torch.Tensor) -> torch.Tensor:
            whole = gather(hidden, 0, group, partial=False) if group is not None and sequence else hidden
            return whole.index_select(0, rows)

        def whole_head() -> Head:
            assert head is not None
            return at_head(hidden[:0], head, bias, decoder.logit_scale)[1]

        def lasting_head() -> Head:  # FSDP frees what it has gathered; one copy serves all microbatches
            if self.model.mesh is None and bias is None:
                return whole_head()
            copy = None if self._head_copy is None else self._head_copy()
            if copy is None:
                copy = whole_head().weight.detach().clone()
                self._head_copy = weakref.ref(copy)
            assert head is not None
            return replace(head, weight=copy)

        return Output(
            batch,
            hidden=rows_for_head,
            whole_hidden=whole_rows,
            head=whole_head,
            lasting_head=lasting_head,
            score=decoder.score.weight[0] if head is None else None,
            sharing_group=None,
            check_numerics=self._check_numerics,
            softcap=decoder.softcap,
        )

    # --- gradients ----------------------------------------------------------------------------

    def _accumulate_in_fp32(self) -> None:
        """Without FSDP, which does so by itself, add up the gradients of 16-bit parameters in fp32."""
        if self.model.mesh is not None:
            return
        for name in self._trained:
            param = self.model.params[name]
            if param.dtype == torch.float32:
                continue

            def add(param: torch.Tensor, name: str = name) -> None:
                assert param.grad is not None
                if (total := self._main_grads.get(name)) is not None:
                    total.add_(param.grad)
                else:
                    self._main_grads[name] = param.grad.float()
                param.grad = None

            param.register_post_accumulate_grad_hook(add)

    def _add_reduced(self) -> None:
        """Add this rank's part of a microbatch's reduced gradients to those of the step, in fp32."""
        for name in self._trained:
            param = self.model.params[name]
            if param.grad is None:
                continue
            part = local(param.grad)
            param.grad = None
            if (total := self._main_grads.get(name)) is not None:
                total.add_(part)
            else:
                self._main_grads[name] = part.to(torch.float32, copy=True)

    def _zero_gradients(self) -> None:
        self._main_grads.clear()
        for param in self.model.params.values():
            param.grad = None

    def _take_gradients(self) -> dict[str, torch.Tensor]:
        main, self._main_grads = self._main_grads, {}
        return self.model.take_gradients(self._trained, main)

    # --- reference ----------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """See Trainer."""
        if self.lora is None:  # else the frozen weights are there already
            self._reference = self.model.copies()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """See Trainer."""
        if self.lora is not None:
            inside = self.lora.off()
        else:
            assert self._reference is not None, "keep_reference() first"
            inside = self.model.exchanged(self._reference)
        with inside:
            yield

    @contextmanager
    def weights_of(self, model_dir: str) -> Iterator[None]:
        """See Trainer."""
        self._load_hf(model_dir)
        try:
            yield
        finally:
            self._load_hf(self._model_dir)

    def _load_hf(self, model_dir: str) -> None:
        self._head_copy = None
        tensors = {name: tensor for name, tensor in self.model.tensors.items() if not is_adapter(name)}
        load_hf(model_dir, self.architecture, self.regions, tensors, self._initial)

    # --- memory -------------------------------------------------------------------------------

    def sleep(self, parts: Iterable[str]) -> None:
        """See Trainer."""
        if "gradients" in parts:
            self._zero_gradients()
        if "optimizer" in parts and not self._asleep:
            self._copies.move(self.optimizer.movable())
            self._asleep = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine's allocator is another process's

    def wake(self) -> None:
        """See Trainer."""
        self._copies.move_back()
        self._asleep = False

    def memory_bytes(self) -> dict[str, int]:
        """See Trainer. Gradients are those of the last optimizer step, which are freed after it."""
        parts = parts_in_memory(
            self.device,
            parameters=self.model.tensors.values(),
            optimizer=(tensor for _, tensor, _ in self.optimizer.movable()),
            reference=(self._reference or {}).values(),
            merged=() if self.lora is None else self.lora.published(),
        )
        return parts | ({"gradients": self._gradient_bytes} if self._gradient_bytes else {})

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """See Trainer."""
        self._start_save(directory, optimizer, background=False).finish()

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """See Trainer."""
        return self._start_save(directory, optimizer, background=True)

    def _start_save(self, directory: Path, optimizer: bool, *, background: bool) -> PendingSave:
        self.wake()
        steps = self.optimizer.num_steps
        return checkpoint.start_save(directory, self._held(optimizer), steps, background=background)

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """See Trainer."""
        self.wake()
        self._head_copy = None
        steps = checkpoint.read(directory, self._held(optimizer))
        self.optimizer.go_on_after(steps)
        if not optimizer:
            self.optimizer.read_masters()
        ranks = self.context.layout.world_size
        state = random_state.read(directory, self.context.rank, ranks)
        return state is not None and random_state.put(state)

    def _held(self, optimizer: bool) -> dict[str, checkpoint.Held]:
        if optimizer:
            self.optimizer.initialize_state()
        tensors = self.model.tensors
        if self.lora is not None:  # the frozen weights are those of model.path
            tensors = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        return checkpoint.held(tensors, self.parts, self.optimizer if optimizer else None)
