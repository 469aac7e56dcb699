"""The engine's process: a model of transformers with the trainer's weights, and the scheduler."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from megarl import platform
from megarl.errors import UserError
from megarl.inference.actor.worker import EngineActor
from megarl.inference.hf.attention import LayerShape, NotPackable
from megarl.inference.hf.model import build_model, measure, parameters, why_not_paged
from megarl.inference.hf.packing_check import packing_error
from megarl.inference.hf.pages import PAGE
from megarl.inference.hf.runner import PagedRunner, RowRunner, Runner, num_pages
from megarl.inference.hf.scheduler import Scheduler
from megarl.inference.interface import (
    AttachReport,
    EngineMemory,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    WeightPlanError,
)
from megarl.inference.memory_use import engine_memory
from megarl.inference.weight_receiver import AttachedWeights, check_plan, dtype_name
from megarl.models.table import Region
from megarl.models.transformers_regions import transformers_regions
from megarl.platform import memory
from megarl.weights.checksum import RegionChecksum, region_checksum
from megarl.weights.memory_domain import device_id, host_id
from megarl.weights.sync_plan import ParamInfo, WeightPlan


class HfEngineActor(EngineActor):
    """One rank: model, weights and scheduler on the actor's engine thread."""

    def _build(self) -> None:
        settings = self._settings
        self._device = torch.device("cpu" if platform.chosen_name() == "cpu" else "cuda:0")
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        how = settings.model_dir, self._dtype, self._device, settings.trust_remote_code
        self._model = build_model(*how)
        self._attached: AttachedWeights | None = None
        self._note = why_not_paged(self._model, settings.max_model_len) or ""
        shapes: dict[int, LayerShape] = {}
        if not self._note:
            try:
                shapes = measure(self._model)
            except NotPackable as error:
                self._note = str(error)
        if self._note:  # eager attention leaves no rule of a layer out, unlike sdpa
            self._model = build_model(*how, attention="eager")
        self._parameters = parameters(self._model)
        self._scheduler = self._schedule(shapes)

    def _schedule(self, shapes: dict[int, LayerShape]) -> Scheduler:
        """With one forward pass for all requests, or, without shapes, one for each."""
        config = self._settings.config
        max_bytes, longest = int(config.kv_cache_gib * 2**30), self._settings.max_model_len
        runner: Runner
        if shapes:
            pages = num_pages(shapes, self._dtype, max_bytes)
            if pages < math.ceil(longest / PAGE):
                raise UserError(
                    f"rollout.engine.kv_cache_gib: {config.kv_cache_gib:g} GiB hold {pages * PAGE} tokens, a "
                    f"sequence has up to {longest}"
                )
            if self._device.type == "cuda":
                _check_free(max_bytes)
            runner = PagedRunner(self._model, shapes, pages, keep_prefixes=config.enable_prefix_caching)
        else:
            self._note = f"requests are computed one by one: {self._note}"
            print(self._note)
            runner = RowRunner(self._model, max_bytes)
        return Scheduler(
            runner,
            max_num_seqs=config.max_num_seqs,
            max_tokens=max(config.max_num_batched_tokens, longest),
            max_model_len=longest,
            share_prompts=config.enable_prefix_caching,
            seed=self._settings.seed,
        )

    def _step(self) -> list[GeneratedResponse]:
        return self._scheduler.step()

    def _add(self, request: GenerateRequest, sampling: SamplingConfig) -> None:
        self._scheduler.add([request], sampling)

    def _abort(self, request_ids: set[str]) -> list[GeneratedResponse]:
        return self._scheduler.abort(request_ids)

    def _describe_parameters(self) -> list[dict[str, ParamInfo]]:
        return [{name: ParamInfo(tuple(p.shape), dtype_name(p)) for name, p in self._parameters.items()}]

    def _regions(self, names: list[str]) -> list[Region]:
        shapes = {name: tuple(param.shape) for name, param in self._parameters.items()}
        return transformers_regions(self._model, shapes, frozenset(names))

    def _places(self) -> list[tuple[str, str]]:
        return [(host_id(), device_id(self._device))]

    def _attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        if len(plans) != 1:
            raise WeightPlanError([f"{len(plans)} plans for 1 engine rank"])
        violations = check_plan(plans[0], self._parameters)
        if violations:
            raise WeightPlanError(violations)
        self._attached = AttachedWeights(plans[0], self._parameters, self._attached)
        memory.release_unused()  # the weights that the engine was built with
        self._check_packing(self._attached)
        return [replace(self._attached.report(), note=self._note)]

    def _check_packing(self, attached: AttachedWeights) -> None:
        """With the trainer's weights, do requests in one pass get the logits they get alone?"""
        if self._note or len(self._scheduler):
            return
        attached.copy_()
        self._note = packing_error(self._model, self._scheduler.runner) or ""
        if self._note:
            self._model.set_attn_implementation("eager")
            self._scheduler = self._schedule({})

    def _sync(self, policy_version: int) -> int:
        assert self._attached is not None, "sync before attach"
        num_bytes = self._attached.copy_()
        memory.wait_for(self._device)  # the trainer may write once this returns
        if not self._settings.keep_kv_cache:
            self._scheduler.forget()  # stale; running requests are computed again
        self._scheduler.policy_version = policy_version
        return num_bytes

    def _memory(self) -> list[EngineMemory]:
        runner = self._scheduler.runner
        return [engine_memory(self._parameters, self._attached, runner.kv_caches(), self._device)]

    def _checksums(self) -> list[list[RegionChecksum]]:
        assert self._attached is not None, "checksums before attach"
        return [
            [
                RegionChecksum(param, index, dtype_name(tensor), region_checksum(tensor))
                for param, index, tensor in self._attached.regions()
            ]
        ]

    def _sleep(self) -> None:
        assert not self._requests, "the cache of running requests cannot be given up"
        self._scheduler.runner.sleep()

    def _wake(self) -> None:
        pass  # memory is taken again where it is written


def _check_free(wanted: int) -> None:
    free, total = torch.cuda.mem_get_info()
    if wanted > free:
        gib = 2**30
        raise UserError(
            f"rollout.engine.kv_cache_gib: {wanted / gib:.2f} GiB do not fit: {free / gib:.2f} of "
            f"{total / gib:.1f} GiB are free beside the trainer and the engine's weights"
        )
