"""Write a rank's part of a checkpoint as files of torch's distributed checkpoint (DCP).

Ranks communicate only after writing: a rank's files need no other rank's, and the first rank completes the
checkpoint from all reports.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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

from megarl.cluster.collectives import from_first_rank, gather_to_first_rank
from megarl.errors import UserError
from megarl.files import disk_is_full
from megarl.platform.memory import wait_for
from megarl.trainer.checksums import Checksum, checksums_of, write_checksums


@dataclass(frozen=True, slots=True)
class Report:
    """The files one rank has written, or its error."""

    items: list[WriteItem]
    results: list[WriteResult]
    error: str | None = None
    checksums: dict[str, Checksum] = field(default_factory=dict)


class RankFiles:
    """The files of one rank: its pieces of tensors, objects, and whole small files."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        small: Mapping[str, Any],
        seal: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        """``small`` has files by name; objects that are no tensors are serialised now.

        ``seal`` writes, on the first rank, the files of a backend's checkpoints apart from DCP's.
        """
        self._directory, self._rank, self._seal = directory, rank, seal
        self._small = {name: _serialised(value) for name, value in small.items()}
        self._values: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        self._items: list[WriteItem] = []
        # CPU tensors are read while writing; those still on a GPU are copied one by one.
        self._writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)

    def add_object(self, key: str, value: Any) -> None:
        """Add an object that is no tensor, under a name unique among ranks."""
        index = MetadataIndex(key)
        self._values[index] = _serialised(value)
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO))

    def add_piece(
        self, key: str, offset: Sequence[int], values: torch.Tensor, dtype: torch.dtype, whole: Sequence[int]
    ) -> None:
        """Add a box of the tensor ``key`` of shape ``whole``; no other rank adds it."""
        index = MetadataIndex(key, torch.Size(offset))
        self._values[index] = values
        chunk = ChunkStorageMetadata(torch.Size(offset), values.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole))
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

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
        except Exception as error:  # whatever it is, all ranks have to hear of it
            full = disk_is_full(self._directory, error)
            return Report([], [], str(full or error) or type(error).__name__)
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
            self._seal(self._directory)
            found = {name: each for report in reports for name, each in report.checksums.items()}
            write_checksums(self._directory, found)
        except OSError as error:
            raise self._unwritten(0, str(error)) from error

    def _unwritten(self, rank: int, why: str) -> UserError:
        return UserError(f"checkpoint {self._directory}: rank {rank} could not write it: {why}")


class PendingSave:
    """A checkpoint whose files a thread writes from host memory; see trainer.interface.PendingSave."""

    def __init__(self, files: RankFiles, *, background: bool) -> None:
        self._files = files
        self._report: Report | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        if background:
            self._thread.start()
        else:
            self._write()

    def _write(self) -> None:
        self._report = self._files.write()

    def done(self) -> bool:
        """Return True if this rank's files are on disk."""
        return self._report is not None

    def finish(self) -> None:
        """Wait for every rank's files and complete the checkpoint; all ranks call it.

        Raises:
            UserError: a rank could not write, e.g. the disk is full.
        """
        if self._thread.ident is not None:
            self._thread.join()
        assert self._report is not None
        reports = gather_to_first_rank(self._report)
        from_first_rank(lambda: self._files.complete(reports))


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
