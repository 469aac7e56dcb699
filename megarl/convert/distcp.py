"""Read and write Megatron's distributed checkpoints (torch_dist), one piece at a time.

The format is torch.distributed.checkpoint's: ``.metadata`` maps each chunk of a tensor to a byte range of a
.distcp file, written by ``torch.save``. Megatron adds metadata.json and common.pt.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.convert.pieces import Piece
from megarl.errors import UserError
from megarl.files import stand_in
from megarl.terminal import one_line
from megarl.trainer.checkpoint_metadata import read_metadata

_MEGATRON_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistcpReader:
    """The tensors of one distributed checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        metadata = read_metadata(directory)
        self._directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
        self._chunks: dict[str, list[tuple[tuple[int, ...], Any]]] = defaultdict(list)
        for index, info in metadata.storage_data.items():
            if index.fqn in self.shapes:
                if getattr(info, "transform_descriptors", None):
                    raise UserError(f"{directory}: {index.fqn} is stored compressed, which is not supported")
                outside = info.relative_path in (".", "..") or "/" in info.relative_path
                if outside or info.offset < 0 or info.length < 0:
                    raise UserError(f"{directory}/.metadata: sends {index.fqn} to {info.relative_path!r}")
                self._chunks[index.fqn].append((tuple(index.offset), info))
        self._last: tuple[Any, torch.Tensor] | None = None

    def read(self, piece: Piece) -> torch.Tensor:
        """Read a piece, without its leading axes and without the checkpoint's padding rows."""
        key = self.key_of(piece)
        assert key is not None, "check the keys first"
        sizes = self.shapes[key]
        depth = len(piece.axes)
        rows = sum(shape[0] for _, shape in piece.parts)
        want = [*((index, index + 1) for index, _ in piece.axes), *((0, size) for size in sizes[depth:])]
        want[depth] = (0, min(rows, sizes[depth]))
        out = torch.empty([stop - start for start, stop in want], dtype=self.dtypes[key])
        covered = 0
        for offset, info in self._chunks[key]:
            covered += self._copy_chunk(out, want, offset, info)
        if covered != out.numel():
            raise UserError(f"{self._directory}: {covered} of {out.numel()} elements of {key} are stored")
        return out.reshape(out.shape[depth:])

    def key_of(self, piece: Piece) -> str | None:
        """Return the key under which the piece is stored, or None."""
        return next((key for key in (piece.key, *piece.twins) if key in self.shapes), None)

    def _copy_chunk(
        self, out: torch.Tensor, want: list[tuple[int, int]], offset: tuple[int, ...], info: Any
    ) -> int:
        if any(start >= w1 for start, (_, w1) in zip(offset, want, strict=True)):
            return 0
        chunk = self._load(info)
        spans = [
            (max(start, w0), min(start + size, w1))
            for start, size, (w0, w1) in zip(offset, chunk.shape, want, strict=True)
        ]
        if any(start >= stop for start, stop in spans):
            return 0
        target = tuple(slice(a - w0, b - w0) for (a, b), (w0, _) in zip(spans, want, strict=True))
        source = tuple(slice(a - start, b - start) for (a, b), start in zip(spans, offset, strict=True))
        out[target] = chunk[source]
        return math.prod(b - a for a, b in spans)

    def _load(self, info: Any) -> torch.Tensor:
        place = (info.relative_path, info.offset)
        if self._last is None or self._last[0] != place:
            path = self._directory / info.relative_path
            try:
                with path.open("rb") as file:
                    file.seek(info.offset)
                    data = file.read(info.length)
                tensor = torch.load(io.BytesIO(data), weights_only=True)
                assert isinstance(tensor, torch.Tensor), "no tensor where .metadata says one is"
                self._last = (place, tensor)
            except FileNotFoundError:
                raise UserError(f"{path}: missing, and .metadata names it") from None
            except Exception as error:  # torch's reader and its unpickler raise types of their own
                reason = stand_in(path) or f"damaged or cut short ({one_line(str(error))[:200]})"
                raise UserError(f"{path}: {reason}") from error
        return self._last[1]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A planned .distcp file: its name and pieces."""

    name: str
    pieces: tuple[Piece, ...]


def assign_files(pieces: list[Piece], bytes_of: Callable[[Piece], int], max_bytes: int) -> list[ShardFile]:
    """Assign pieces, in order, to files of at most ``max_bytes`` (or one piece)."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        num_bytes = bytes_of(piece)
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += num_bytes
    return [ShardFile(f"__0_{number}.distcp", tuple(group)) for number, group in enumerate(groups)]


def write_file(directory: Path, file: ShardFile, tensors: Iterator[torch.Tensor]) -> None:
    """Write one file, then its index; a file without an index is incomplete and rewritten."""
    entries = []
    partial = directory / f"{file.name}.partial"
    with partial.open("wb") as out:
        for piece, tensor in zip(file.pieces, tensors, strict=True):
            whole = tensor.reshape([1] * len(piece.axes) + list(tensor.shape)).contiguous()
            start = out.tell()
            torch.save(whole.clone(), out)
            for key in (piece.key, *piece.twins):
                entries.append(
                    {
                        "key": key,
                        "global_shape": piece.global_shape,
                        "offset": piece.offset,
                        "shape": list(whole.shape),
                        "dtype": str(whole.dtype).removeprefix("torch."),
                        "start": start,
                        "length": out.tell() - start,
                    }
                )
        out.flush()
        os.fsync(out.fileno())
    partial.rename(directory / file.name)
    index = directory / f"{file.name}.json"
    index.with_suffix(".partial").write_text(json.dumps(entries))
    index.with_suffix(".partial").rename(index)


def is_finished(directory: Path, file: ShardFile) -> bool:
    """Return whether an earlier run has written this file with these pieces."""
    index = directory / f"{file.name}.json"
    if not index.is_file() or not (directory / file.name).is_file():
        return False
    entries = json.loads(index.read_text())
    keys = [(entry["key"], tuple(entry["offset"])) for entry in entries]
    end = max(entry["start"] + entry["length"] for entry in entries)
    wanted = [(key, piece.offset) for piece in file.pieces for key in (piece.key, *piece.twins)]
    return keys == wanted and (directory / file.name).stat().st_size == end


def finish(directory: Path, files: list[ShardFile], extra_states: list[str], common: dict[str, Any]) -> None:
    """Write .metadata, metadata.json, common.pt and the extra states; delete the index files."""
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for entry in json.loads((directory / f"{file.name}.json").read_text()):
            offset, shape = torch.Size(entry["offset"]), torch.Size(entry["shape"])
            key = entry["key"]
            if key not in state:
                properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
                state[key] = TensorStorageMetadata(properties, torch.Size(entry["global_shape"]), [])
            state[key].chunks.append(ChunkStorageMetadata(offset, shape))
            storage[MetadataIndex(key, offset)] = _StorageInfo(file.name, entry["start"], entry["length"])
    with (directory / "__0_extra.distcp").open("wb") as out:
        for key in extra_states:
            start = out.tell()
            torch.save([None], out)
            state[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo("__0_extra.distcp", start, out.tell() - start)
    with (directory / ".metadata").open("wb") as out:
        pickle.dump(Metadata(state, planner_data=None, storage_data=storage), out)
    (directory / "metadata.json").write_text(json.dumps(_MEGATRON_METADATA))
    torch.save(common, directory / "common.pt")
    for file in files:
        (directory / f"{file.name}.json").unlink()
