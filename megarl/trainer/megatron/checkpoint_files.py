"""Write a rank's part of a sharded state dict as files of torch's distributed checkpoint (DCP).

Ranks communicate only after writing: a rank's files need no other rank's, and the first rank completes the
checkpoint from all reports. Megatron's own background saves have a manager process on every rank, and another
implementation in every version; the files are the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megarl.errors import UserError
from megarl.platform.memory import wait_for
from megarl.trainer.checksums import Checksum, checksums_of, write_checksums
from megarl.trainer.megatron.optimizer_shards import OptimizerShards

COMMON_FILE = "common.pt"


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank has written, or its error."""

    items: list[WriteItem]
    results: list[WriteResult]
    error: str | None = None
    checksums: dict[str, Checksum] = field(default_factory=dict)


class RankFiles:
    """The files of one rank: its pieces of tensors, objects, and whole small files."""

    def __init__(
        self,
        directory: Path,
        state: dict[str, Any],
        rank: int,
        small: Mapping[str, Any],
        shards: OptimizerShards,
    ) -> None:
        """``state`` is a sharded state dict; its unsharded part goes into the first rank's common.pt.

        ``small`` has further files by name, ``shards`` the values of tensors described without values.
        Objects that are no tensors are serialised here, with their current values.
        """
        self._directory, self._rank = directory, rank
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        files = dict(small) | ({COMMON_FILE: common} if rank == 0 else {})
        self._small = {name: _serialised(value) for name, value in files.items()}
        self._values: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        self._items: list[WriteItem] = []
        for part in nested_values(sharded):
            if isinstance(part, ShardedTensor) and shards.holds(part):
                for offset, values in shards.pieces(part):
                    self._add_piece(part, offset, values)
            elif is_main_replica(part.replica_id):  # one of several replicas writes it
                self._add(part)
        # CPU tensors are read while writing; those still on a GPU are copied one by one.
        self._writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)

    def _add(self, part: ShardedTensor | ShardedObject) -> None:
        if isinstance(part, ShardedTensor):
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            self._add_piece(part, part.global_offset, part.data.detach().reshape(shape))
            return
        index = MetadataIndex(part.unique_key)
        self._values[index] = _serialised([part.data])
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO))

    def _add_piece(self, part: ShardedTensor, offset: tuple[int, ...], values: torch.Tensor) -> None:
        index = MetadataIndex(part.key, torch.Size(offset))
        self._values[index] = values
        chunk = ChunkStorageMetadata(torch.Size(offset), values.shape)
        whole = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size(part.global_shape))
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=whole))

    def detach(self) -> None:
        """Copy every tensor to separate host memory, so that its source may change."""
        devices = set()
        for index, value in self._values.items():
            if isinstance(value, torch.Tensor):
                on_gpu = value.device.type == "cuda"
                # Page-locked, so the copies run at full rate and the host waits once for all.
                copy = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=on_gpu)
                self._values[index] = copy.copy_(value, non_blocking=on_gpu)
                devices.add(value.device)
        for device in devices:
            wait_for(device)

    def write(self) -> Report:
        """Write everything; it is on disk when the call returns. No communication."""
        try:
            for name, content in self._small.items():
                with (self._directory / name).open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            plan = SavePlan(self._items)
            [*_, plan] = self._writer.prepare_global_plan([*([SavePlan([])] * self._rank), plan])
            results = self._writer.write_data(plan, _PlannedValues(self._values)).wait()
            names = {result.storage_data.relative_path for result in results} | self._small.keys()
            checksums = checksums_of(self._directory, sorted(names))
        except Exception as error:  # all ranks must learn of any error
            return Report([], [], str(error) or type(error).__name__)
        finally:
            self._values.clear()
        return Report(self._items, results, checksums=checksums)

    def complete(self, reports: list[Report]) -> None:
        """On the first rank, with every rank's report: write what completes the checkpoint.

        Raises:
            UserError: a rank could not write, e.g. the disk is full.
        """
        for rank, report in enumerate(reports):
            if report.error is not None:
                raise self._unwritten(rank, report.error)
        plans = [SavePlan(report.items) for report in reports]
        _, metadata = create_default_global_save_plan(plans)
        _check_whole(metadata.state_dict_metadata)
        try:
            self._writer.finish(metadata, [report.results for report in reports])
            save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))
            found = {name: each for report in reports for name, each in report.checksums.items()}
            write_checksums(self._directory, found)
        except OSError as error:
            raise self._unwritten(0, str(error)) from error

    def _unwritten(self, rank: int, why: str) -> UserError:
        return UserError(f"checkpoint {self._directory}: rank {rank} could not write it: {why}")


class _PlannedValues(DefaultSavePlanner):
    """Give the writer the values of a plan's items."""

    def __init__(self, values: Mapping[MetadataIndex, torch.Tensor | io.BytesIO]) -> None:
        super().__init__()
        self._held = values

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._held[write_item.index]


def _serialised(value: Any) -> io.BytesIO:
    content = io.BytesIO()
    torch.save(value, content)
    return content


def _check_whole(state: Mapping[str, Any]) -> None:
    """Assert that every tensor's pieces cover it exactly once: the ranks' layouts are consistent."""
    for key, tensor in state.items():
        if isinstance(tensor, TensorStorageMetadata):
            sizes = [chunk.sizes.numel() for chunk in tensor.chunks]
            assert sum(sizes) == tensor.size.numel(), (
                f"{key} {tuple(tensor.size)}: pieces of {sizes} elements"
            )
            starts = {tuple(chunk.offsets) for chunk, size in zip(tensor.chunks, sizes, strict=True) if size}
            assert len(starts) == sum(size > 0 for size in sizes), f"{key}: two ranks have the same piece"
