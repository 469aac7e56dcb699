"""What `megarl convert` and `megarl merge` read and write, checked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from megarl.config.hub import HubDirectory, argument_directory, fetch
from megarl.errors import UserError
from megarl.terminal import working

ADAPTER_CONFIG = "adapter_config.json"
_TRACKER = "latest_checkpointed_iteration.txt"


def model_directory(named: str, argument: str) -> Path:
    """Return the Hugging Face directory named by path or hub id; of an id the weights are downloaded.

    Raises:
        UserError: there is none; the message begins with ``argument``.
    """
    directory = _found(named, argument)
    if not (Path(directory) / "config.json").is_file():
        hint = ": a checkpoint; megatron-to-hf or torch-to-hf reads it" if _is_checkpoint(directory) else ""
        raise UserError(f"{argument}: {named}: no config.json in it{hint}")
    _fetch(directory, argument)
    return Path(directory)


def checkpoint_directory(named: str, argument: str) -> Path:
    """Return the directory of a trainer's checkpoint; UserError if it is none."""
    directory = Path(named)
    if not directory.is_dir():
        raise UserError(f"{argument}: no such directory (got {named!r})")
    if not _is_checkpoint(directory) and (directory / "config.json").is_file():
        why = "neither a Megatron checkpoint nor a directory of them, but a Hugging Face directory"
        raise UserError(f"{argument}: {named}: {why}; hf-to-megatron or hf-to-torch reads it")
    return directory


def adapter_directory(named: str, argument: str) -> Path:
    """Return the directory of an adapter: itself, its hub id (downloaded), or that of the run it is in.

    Raises:
        UserError: there is none.
    """
    directory = _found(named, argument)
    for each in (Path(directory), Path(directory) / "adapter"):
        if (each / ADAPTER_CONFIG).is_file():
            _fetch(directory, argument)
            return each
    has_checkpoints = (Path(directory) / "checkpoints").is_dir()
    hint = "; `megarl convert` merges those of a checkpoint" if has_checkpoints else ""
    raise UserError(
        f"{argument}: {named}: no adapter ({ADAPTER_CONFIG}) in it or in its folder adapter{hint}"
    )


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError if ``target`` exists and may not be replaced."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; give another directory or pass --overwrite")


def _found(named: str, argument: str) -> str:
    with working(f"looking for {named}"):
        return argument_directory(named, argument)


def _fetch(directory: str, argument: str) -> None:
    if not isinstance(directory, HubDirectory):
        return
    try:
        fetch(directory)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error


def _is_checkpoint(directory: str | Path) -> bool:
    return any((Path(directory) / name).is_file() for name in (".metadata", _TRACKER))
