"""Read a checkpoint's ``.metadata`` without running code: only pickles of plain records are accepted.

A pickle names the functions that rebuild its objects, and unpickling calls them: in a file from elsewhere
they may be any. Here the names are those that torch.distributed.checkpoint's own records need.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megarl.errors import UserError
from megarl.files import stand_in

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    _METADATA: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint._extension": {"StreamTransformExtension"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
# These names are not imported: a stand-in replaces each.
_NOT_READ = ("torch.distributed.checkpoint.planner", "megatron.core.dist_checkpointing.")


def read_metadata(directory: Path) -> Metadata:
    """Read ``directory``/.metadata.

    Raises:
        UserError: it is missing or damaged, or references anything but the records of a checkpoint.
    """
    path = directory / ".metadata"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{directory}: not a distributed checkpoint (no .metadata in it)") from None
    try:
        value = _Unpickler(io.BytesIO(data)).load()
    except _ForbiddenError as error:
        raise UserError(
            f"{path}: asks for {error}, which no checkpoint needs: it would run code; nothing was run"
        ) from None
    except Exception as error:  # damaged pickles raise some ten types
        reason = stand_in(path) or f"damaged or cut short ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {reason}") from error
    if isinstance(value, _Unread) and vars(value).keys() >= {"state_dict_metadata", "storage_data"}:
        held = vars(value)  # Megatron's own kind
        value = Metadata(held["state_dict_metadata"], storage_data=held["storage_data"])
    if not isinstance(value, Metadata):
        raise UserError(f"{path}: holds a {type(value).__name__}, not the metadata of a checkpoint")
    return value


class _Unread:
    """Stand-in for a record that is not read, such as the plan by which a checkpoint was written."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _ForbiddenError(Exception):
    """A name that is not allowed."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the object of this name if it is one of a checkpoint's records."""
        if module.startswith(_NOT_READ):
            return _Unread
        is_dtype = module == "torch" and name.isidentifier() and _is_dtype(name)
        if not is_dtype and name not in _ALLOWED.get(module, ()):
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)
