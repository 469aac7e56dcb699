"""Models named by their id on the Hugging Face Hub, ``org/name`` or ``org/name@revision``.

An id is resolved to the directory of a snapshot in the hub's cache. A configuration keeps both: its field is
the directory in code, and the id in everything that is written (config.yaml, --dry-run). First only the small
files are downloaded, which checks need; :func:`fetch_weights` brings the rest. The hub's own library reads
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and locks each file while it is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import Field, PlainSerializer
from pydantic.fields import FieldInfo

from megarl.config.section import IS_PATH, Section
from megarl.errors import UserError
from megarl.files import read_index

COMMITS = "MEGARL_HUB_COMMITS"
"""Variable with the commits that a launching process has fetched, as JSON: its ranks take the same."""
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.md")
_ELSEWHERE = ("*/*",)  # other formats and originals lie in folders
_Config = TypeVar("_Config", bound=Section)


class HubDirectory(str):
    """The directory of a snapshot; ``written`` is the id that the configuration has."""

    written: str

    def __new__(cls, directory: str, written: str) -> HubDirectory:
        """Make the text ``directory`` that is written as ``written``."""
        made = super().__new__(cls, directory)
        made.written = written
        return made

    def __reduce__(self) -> Any:
        return HubDirectory, (str(self), self.written)

    @property
    def commit(self) -> str:
        """The commit of the snapshot."""
        return Path(self).name


def as_written(value: str) -> str:
    """Return the id of a snapshot, as the configuration has it; another path unchanged."""
    return value.written if isinstance(value, HubDirectory) else value


_FROM_HUB = PlainSerializer(as_written, return_type=str)
ModelPath = Annotated[str, Field(min_length=1), IS_PATH, _FROM_HUB]
"""A model's directory, or its id on the hub; something that exists on disk wins."""


def is_id(path: str) -> bool:
    """Return whether ``path`` reads as an id and nothing of this name is on disk."""
    try:
        return _ID.fullmatch(path) is not None and not Path(path).exists()
    except OSError:
        return False


def is_model_id(text: str) -> bool:
    """Return whether ``text`` has the form of an id, org/name or org/name@revision."""
    return _ID.fullmatch(text) is not None


def models_in(section: Section, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the field, value) for every model that a configuration names."""
    for name, field in type(section).model_fields.items():
        value = vars(section).get(name)
        if isinstance(value, str) and _names_a_model(field):
            yield (*at, name), value
        for key, each in value.items() if isinstance(value, dict) else (("", value),):
            if isinstance(each, Section):
                yield from models_in(each, (*at, name, key) if key else (*at, name))


def _names_a_model(field: FieldInfo) -> bool:
    alternatives = (part for part in get_args(field.annotation) if get_origin(part) is Annotated)
    return any(
        _FROM_HUB in metadata for metadata in (field.metadata, *(a.__metadata__ for a in alternatives))
    )


def resolve(config: _Config) -> tuple[_Config, list[tuple[tuple[str, ...], str]]]:
    """Return the configuration with directories for ids, and what could not be resolved.

    Downloads small files only. Problems are (path of the field, message).
    """
    problems = []
    for path, value in list(models_in(config)):
        if isinstance(value, HubDirectory) or not is_id(value):
            continue
        try:
            directory = HubDirectory(_snapshot(value, _SMALL), value)
        except UserError as error:
            problems.append((path, str(error)))
        else:
            config = _replaced(config, path, directory)
    return config, problems


def fetch_weights(config: Section) -> None:
    """Download the weights of all models that :func:`resolve` has resolved.

    Raises:
        UserError: the hub does not answer, or a model has no safetensors.
    """
    for path, value in models_in(config):
        if isinstance(value, HubDirectory):
            try:
                fetch(value)
            except UserError as error:
                raise UserError(f"{'.'.join(path)}: {error}") from error


def fetch(directory: HubDirectory) -> None:
    """Download the weights of one snapshot; raises as :func:`fetch_weights`."""
    index = Path(directory) / "model.safetensors.index.json"
    names = sorted(set(read_index(index).values())) if index.is_file() else ["model.safetensors"]
    if (Path(directory) / "adapter_config.json").is_file():
        names = ["adapter_model.safetensors"]
    if all((Path(directory) / name).is_file() for name in names):
        return
    _snapshot(directory.written, names, commit=directory.commit)
    if missing := [name for name in names if not (Path(directory) / name).is_file()]:
        raise UserError(f"{directory.written} has no {missing[0]} on the hub; weights must be safetensors")


def commits(config: Section) -> str | None:
    """Return the value of :data:`COMMITS` for the ranks of this configuration; None without hub models."""
    found = {value.written: value.commit for _, value in models_in(config) if isinstance(value, HubDirectory)}
    return json.dumps(found) if found else None


def resolve_id(model_id: str) -> HubDirectory:
    """Return the snapshot of one id, with its small files; raises as :func:`fetch_weights`."""
    return HubDirectory(_snapshot(model_id, _SMALL), model_id)


def argument_directory(named: str, argument: str) -> str:
    """Return the directory that a command's ``argument`` names by path, or the snapshot of an id.

    Raises:
        UserError: no such directory, or the hub does not have it; the message begins with ``argument``.
    """
    if not is_id(named):
        if not named or not Path(named).is_dir():
            raise UserError(f"{argument}: no such directory (got {named!r})")
        return named
    try:
        return resolve_id(named)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error


def directory_of(path: str) -> str:
    """Return the directory of a model named by path or id; raises as :func:`fetch_weights`."""
    return resolve_id(path) if is_id(path) else path


def _snapshot(model_id: str, patterns: Any, commit: str | None = None) -> str:
    """Download files that match ``patterns`` and return their directory."""
    match = _ID.fullmatch(model_id)
    assert match is not None, f"{model_id} is not an id"
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = match["repo"], match["revision"]
    pinned = commit or json.loads(os.environ.get(COMMITS, "{}")).get(model_id)
    options: dict[str, Any] = {
        "revision": pinned or revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": list(_ELSEWHERE),
    }
    nothing = f"no such directory (got {model_id!r}), and as an id of the hub"
    try:
        if pinned and commit is None:  # the launching process has it
            try:
                return str(snapshot_download(repo, local_files_only=True, **options))
            except LocalEntryNotFoundError:  # on another machine
                pass
        return str(snapshot_download(repo, **options))
    except GatedRepoError:
        reason = f"access to it must be asked for: {constants.ENDPOINT}/{repo} (then set HF_TOKEN)"
    except RepositoryNotFoundError:
        reason = f"{constants.ENDPOINT} has no such model, or HF_TOKEN may not read it"
    except RevisionNotFoundError:
        reason = f"{repo} has no revision {revision!r}"
    except HFValidationError as error:
        reason = " ".join(str(error).split())
    except Exception as error:  # of two HTTP libraries, and of the disk
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        with_revision = f" --revision {revision}" if revision else ""
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.is_offline_mode()
            else f"{constants.ENDPOINT} does not answer"
        )
        reason = (
            f"not in the cache {constants.HF_HUB_CACHE}, and {why}; where the hub can be reached, run "
            f"`hf download {repo}{with_revision}`"
        )
    raise UserError(f"{nothing} {reason}")


def _replaced(section: _Config, path: tuple[str, ...], value: str) -> _Config:
    """Return a copy of ``section`` with another value at ``path``."""
    name, *rest = path
    old = getattr(section, name)
    if not rest:
        new: Any = value
    elif isinstance(old, dict):
        key, *inner = rest
        new = old | {key: _replaced(old[key], tuple(inner), value)}
    else:
        new = _replaced(old, tuple(rest), value)
    return section.model_copy(update={name: new})
