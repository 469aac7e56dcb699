"""Checkpoints of the torch backend: torch's distributed format (DCP), read under any layout.

Keys are ``model.NAME`` and ``optimizer.KIND.NAME`` with transformers' names of parameters. Every rank writes
the boxes of whole tensors that it holds and reads those that it wants; who wrote them does not matter. Beside
them ``trainer.json`` has what is one number for all, and each rank's random state is a file of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarl.errors import UserError
from megarl.models.table import Box
from megarl.trainer import random_state
from megarl.trainer.checkpoint_files import PendingSave, RankFiles
from megarl.trainer.checkpoint_metadata import read_metadata
from megarl.trainer.torch.optimizer import Optimizer
from megarl.trainer.torch.shards import Part

TRAINER_FILE = "trainer.json"
MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's local tensor, and which part of the whole one it is."""

    tensor: torch.Tensor
    part: Part

    def view(self, here: Box) -> torch.Tensor:
        """The local box of a chunk."""
        return self.tensor[tuple(slice(*span) for span in here)]


def held(
    tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part], optimizer: Optimizer | None
) -> dict[str, Held]:
    """By key, what a rank has of a checkpoint."""
    found = {MODEL + name: Held(tensor, parts[name]) for name, tensor in tensors.items()}
    if optimizer is not None:
        for name, kind, tensor in optimizer.state():
            found[f"{OPTIMIZER}{kind}.{name}"] = Held(tensor, parts[name])
    return found


def start_save(
    directory: Path, state: Mapping[str, Held], num_steps: int, *, background: bool
) -> PendingSave:
    """Begin to write into ``directory`` (existing, empty); every rank then calls ``finish`` of the result."""
    rank = dist.get_rank()
    small = {random_state.file(directory, rank).name: random_state.take()}
    files = RankFiles(directory, rank, small, lambda folder: write_facts(folder, num_steps))
    for key, each in state.items():
        if each.part.first:
            for chunk in each.part.chunks:
                offset = [start for start, _ in chunk.at]
                files.add_piece(key, offset, each.view(chunk.here), each.tensor.dtype, each.part.whole)
    if background:
        files.detach()
    return PendingSave(files, background=background)


def write_facts(directory: Path, num_steps: int) -> None:
    """Write trainer.json, by which a directory is a checkpoint of this backend."""
    facts = {"backend": "torch", "num_steps": num_steps}
    (directory / TRAINER_FILE).write_text(json.dumps(facts) + "\n")


def read(directory: Path, state: Mapping[str, Held]) -> int:
    """Fill what a rank has; the number of optimizer steps that were taken.

    Raises:
        UserError: it is no checkpoint of this backend, or has other tensors.
    """
    facts = _read_facts(directory)
    read_tensors(directory, state)
    return int(facts["num_steps"])


def read_tensors(directory: Path, state: Mapping[str, Held]) -> None:
    """Fill tensors from a DCP directory.

    Raises:
        UserError: it lacks one, or has it in another shape.
    """
    reader = FileSystemReader(directory)
    metadata = read_metadata(directory)
    planner = _Planner(directory, state, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with torch.no_grad():
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / TRAINER_FILE
    if not path.is_file():
        why = "it is not a complete checkpoint"
        if (directory / "metadata.json").is_file():
            why = "trainer.backend = megatron wrote it; export it (megarl convert) to train its weights"
        raise UserError(f"checkpoint {directory} has no {TRAINER_FILE}: {why}")
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


class _Planner(LoadPlanner):
    """Reads boxes of stored tensors into boxes of local ones."""

    def __init__(self, directory: Path, state: Mapping[str, Held], metadata: Metadata) -> None:
        self._directory, self._state, self._metadata = directory, state, metadata

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the constructor has it all."""

    def create_local_plan(self) -> LoadPlan:
        """Every box that this rank wants, from the stored ones that it lies in."""
        return LoadPlan([item for key, each in self._state.items() for item in self._items(key, each)])

    def _items(self, key: str, each: Held) -> Iterator[ReadItem]:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            what = "the optimizer's state" if key.startswith(OPTIMIZER) else f"{key.removeprefix(MODEL)}"
            raise UserError(f"checkpoint {self._directory} lacks {what}")
        if tuple(stored.size) != each.part.whole:
            sizes = f"shape {list(stored.size)}, the model {list(each.part.whole)}"
            raise UserError(f"checkpoint {self._directory}: {key} has {sizes}")
        chunks = [
            ChunkStorageMetadata(torch.Size(start for start, _ in chunk.at), torch.Size(chunk.sizes))
            for chunk in each.part.chunks
        ]
        yield from create_read_items_for_chunk_list(key, stored, chunks)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: ranks read by themselves."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Nothing of this backend's is stored as an object."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a local tensor that an item fills."""
        each, wanted = self._state[read_item.dest_index.fqn], read_item.dest_index.offset
        (chunk,) = (c for c in each.part.chunks if torch.Size(start for start, _ in c.at) == wanted)
        target = each.view(chunk.here)
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: it was read in place."""
