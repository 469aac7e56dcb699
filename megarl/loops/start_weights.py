"""A trainer's checkpoint, or PEFT adapters, as ``model.path``: a Hugging Face directory within the run's.

Either backend's checkpoint is taken, and either backend loads the result, so a run of one backend can start
from the weights of the other's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TypeVar

from megarl.config.evaluate import EvalConfig
from megarl.config.model import is_adapter, is_run_directory
from megarl.config.training import TrainingRoot
from megarl.convert.commands import find_iteration, megatron_to_hf
from megarl.convert.merge import merge
from megarl.convert.torch_native import is_torch_checkpoint, torch_to_hf
from megarl.errors import UserError
from megarl.run_directory import RunDirectory

_FOLDER = "model"
_ORIGIN = "converted_from.json"
_MAX_FILE_BYTES = 2 * 2**30
_POLL_SECONDS = 0.2

Root = TypeVar("Root", TrainingRoot, EvalConfig)


def with_converted_path(config: Root) -> Root:
    """Return ``config`` with the directory that :func:`convert_start` writes as ``model.path``."""
    path = str(Path(config.run.dir) / _FOLDER)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def convert_start(source: str | Path, run_dir: str | Path, *, keep: bool = False) -> str | None:
    """Convert the checkpoint ``source``, bit for bit, unless it is there already; return a line for the log.

    ``source`` is a checkpoint of either backend, a converted one, a run directory (its newest checkpoint is
    taken), or PEFT adapters, which are merged into their base.
    With ``keep`` a run that has begun stays with what it began with, also where ``source`` is newer now.

    Raises:
        UserError: ``source`` cannot be converted, or the run has begun with another.
    """
    directory = RunDirectory(run_dir)
    source, target = Path(source), directory.path / _FOLDER
    if keep and directory.has_begun():
        before = _origin_of(target)
        if before is None or before["source"] != str(source.resolve()):
            was = "a Hugging Face directory" if before is None else before["source"]
            raise UserError(
                f"model.path: {run_dir} was started with {was} (got {source}); set a new run.dir to start "
                "afresh"
            )
        return None
    checkpoint = _newest(source)
    origin = _origin(source, checkpoint)
    if _origin_of(target) == origin:
        return None
    if is_adapter(checkpoint):
        try:
            merge(checkpoint, target, overwrite=True)
        except UserError as error:
            lines = str(error).splitlines()
            raise UserError("\n".join(f"model.path: {line}" for line in lines)) from error
        (target / _ORIGIN).write_text(json.dumps(origin))
        return f"model.path: {checkpoint} merged with its base: {target}"
    convert = torch_to_hf if is_torch_checkpoint(checkpoint) else megatron_to_hf
    convert(checkpoint, target, hf_config=None, dtype=None, max_bytes=_MAX_FILE_BYTES, overwrite=True)
    (target / _ORIGIN).write_text(json.dumps(origin))
    return f"model.path: {checkpoint} converted to {target}"


def wait_for_start(source: str | Path, run_dir: str | Path, seconds: float) -> None:
    """Wait until another rank's :func:`convert_start` (with keep) has written ``source``.

    Raises:
        UserError: it has not within ``seconds``.
    """
    directory, until = RunDirectory(run_dir), time.monotonic() + seconds
    target, source = directory.path / _FOLDER, Path(source)
    origin = _origin(source, _newest(source))
    while True:
        found = _origin_of(target)
        if found == origin or (found and directory.has_begun() and found["source"] == origin["source"]):
            return
        if time.monotonic() > until:
            raise UserError(
                f"model.path: rank 0 has not converted {source} to {target} within "
                "run.hang_timeout_seconds; do all ranks see one run.dir?"
            )
        time.sleep(_POLL_SECONDS)


def _newest(source: Path) -> Path:
    """Return the directory with the weights that ``source`` stands for."""
    if is_adapter(source):
        return source
    if not is_run_directory(source):
        return find_iteration(source)
    newest = RunDirectory(source).latest_checkpoint()
    if newest is None:
        raise UserError(f"model.path: {source} is the directory of a run without a checkpoint")
    return newest


def _origin(source: Path, checkpoint: Path) -> dict[str, Any]:
    marker = "adapter_model.safetensors" if is_adapter(checkpoint) else ".metadata"
    try:
        written = (checkpoint / marker).stat().st_mtime
    except OSError as error:
        raise UserError(f"model.path: {checkpoint / marker}: {error.strerror}") from error
    return {"source": str(source.resolve()), "checkpoint": str(checkpoint.resolve()), "written": written}


def _origin_of(target: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((target / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "source" in found else None
