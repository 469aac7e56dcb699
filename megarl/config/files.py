"""Checks of the files a configuration names: data files, and model directories with their sizes.

Only config.json and the safetensors index are parsed, so this takes milliseconds. Sections that failed
the schema lack fields, so every access is through :func:`_get`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from megarl.config.chat_templates import CHAT_TEMPLATES
from megarl.config.data import parts_of
from megarl.config.environments import RewardModelConfig
from megarl.config.hub import HubDirectory, is_id
from megarl.config.model import is_checkpoint, read_model_config
from megarl.config.section import Problems, Section, as_violation
from megarl.config.violation import Violation, show
from megarl.errors import UserError
from megarl.files import read_index

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def find_file_violations(config: Section, *, weights: bool = True) -> list[Violation]:
    """Return the files that are missing or do not fit; fields that failed the schema are skipped.

    Without ``weights`` model.path needs only config.json and a tokenizer; other models are not checked.
    """
    problems = [*_run_directory(config), *_data_files(config), *_model(config, weights)]
    problems += _other_models(config) if weights else ()
    return [as_violation(problem) for problem in problems]


def _get(section: Any, *names: str) -> Any:
    """Return a field by its path; None if it or an enclosing section failed the schema."""
    for name in names:
        section = getattr(section, name, None)
    return section


def _run_directory(config: Section) -> Problems:
    directory = _get(config, "run", "dir")
    if directory is None:
        return
    try:
        if Path(directory).exists() and not Path(directory).is_dir():
            yield "run.dir", f"is a file, not a directory (got {directory!r})"
        os.stat(directory)
    except FileNotFoundError:
        return
    except OSError as error:  # a name too long, below a file, a loop of links
        yield "run.dir", f"{error.strerror} (got {directory!r})"


def _data_files(config: Section) -> Problems:
    template = _get(config, "data", "format", "chat_template")
    if isinstance(template, str) and template not in CHAT_TEMPLATES and not Path(template).is_file():
        names = f"and no template of this name (they are {', '.join(CHAT_TEMPLATES)})"
        yield "data.format.chat_template", f"no such file{_relative_to(template)}, {names} (got {template!r})"
    for split in ("train", "held_out"):
        for at, source in parts_of(_get(config, "data", split), f"data.{split}"):
            copy, file = _get(source, "directory"), _get(source, "path")
            if copy is not None and not _exists(copy):
                yield f"{at}.directory", f"no such file or directory (got {copy!r}){_relative_to(copy)}"
            if file is not None and not (_exists(file) and Path(file).is_file()):
                yield f"{at}.path", f"no such file (got {file!r}){_relative_to(file)}"
            elif file is not None and Path(file).stat().st_size == 0:
                yield f"{at}.path", f"the file is empty (got {file!r})"
            yield from _environment_files(_get(source, "environment"), f"{at}.environment")


def _environment_files(environment: Any, at: str) -> Problems:
    path, corpus = _get(environment, "path"), _get(environment, "corpus")
    if isinstance(environment, RewardModelConfig) and path is not None:
        yield from _directory(f"{at}.path", path, [], weights=True)
    if corpus is not None and not (_exists(corpus) and Path(corpus).is_file()):
        yield f"{at}.corpus", f"no such file (got {corpus!r}){_relative_to(corpus)}"


def _model(config: Section, weights: bool) -> Problems:
    path = _get(config, "model", "path")
    if path is None or (_get(config, "converts_checkpoints") and is_checkpoint(path)):
        return  # a checkpoint is converted first, with checks of its own
    if not _exists(path):
        yield from _directory("model.path", path, [], weights)
        return
    tokenizer = any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)
    lacks = [] if tokenizer else ["a tokenizer (tokenizer.json)"]
    yield from _directory("model.path", path, lacks, weights)
    if (Path(path) / "config.json").is_file():
        try:
            model_config = read_model_config(path)
        except UserError as error:
            yield "model.path", str(error).removeprefix("model.path: ")
        else:
            yield from _lengths_fit(config, model_config)
            yield from _kv_cache_fits(config, model_config)


def _other_models(config: Section) -> Problems:
    for section in ("reference", "critic", "teacher"):
        if (path := _get(config, section, "path")) is not None:
            yield from _directory(f"{section}.path", path, [], weights=True)


def _directory(field: str, path: str, lacks: list[str], weights: bool) -> Problems:
    directory = Path(path)
    if is_id(path):  # its own resolution says what is missing
        return
    if not (_exists(path) and directory.is_dir()):
        yield field, f"no such directory (got {path!r}){_relative_to(path)}"
        return
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if missing := [
        *missing,
        *lacks,
        *(_missing_weights(directory) if weights and not isinstance(path, HubDirectory) else ()),
    ]:
        yield field, f"the directory lacks {', '.join(missing)} (got {path!r})"


def _missing_weights(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [] if any(directory.glob("*.safetensors")) else ["weights (*.safetensors)"]
    try:
        shards = read_index(index)
    except UserError as error:
        return [f"a readable {index.name} ({str(error).removeprefix(f'{index}: ')})"]
    return [file for file in sorted(set(shards.values())) if not (directory / file).is_file()]


def _lengths_fit(config: Section, model_config: dict[str, Any]) -> Problems:
    positions, longest = (
        model_config.get("max_position_embeddings"),
        _get(config, "packing", "max_sequence_length"),
    )
    if positions is None:
        return
    if type(positions) is not int or positions < 1:
        yield "model.path", f"config.json: max_position_embeddings is no count (got {show(positions)})"
        return
    limit = f"max_position_embeddings = {positions}"
    if longest is not None and longest > positions:
        yield "packing.max_sequence_length", f"the model has {limit} (got {longest})"
    for section in ("rollout", "evaluation"):
        length = _get(config, section, "max_new_tokens")
        # With an explicit max_sequence_length, a rule of the root has compared the two already.
        if length is not None and length >= positions and longest is None:
            reason = f"leaves no room for a prompt within the model's {limit} (got {length})"
            yield f"{section}.max_new_tokens", reason


def _kv_cache_fits(config: Section, model_config: dict[str, Any]) -> Problems:
    """The engine fails to start unless its KV cache holds one sequence of full length."""
    cache, root = _get(config, "rollout", "engine", "kv_cache_gib"), cast(Any, config)
    try:
        if cache is not None:
            longest, gib = root.max_sequence_length(model_config), root.sequence_gib(model_config)
            if gib > cache:
                name = "packing.max_sequence_length"
                takes = f"one sequence of {longest} tokens takes {gib:.2f} GiB"
                reason = f"{takes}; raise it, or lower {name} (got {cache})"
                yield "rollout.engine.kv_cache_gib", reason, name, "model.path"
    except (
        AttributeError,
        KeyError,
        TypeError,
        ZeroDivisionError,
    ):  # a field that failed the schema, or that config.json does not have
        return


def _exists(path: str) -> bool:
    """Whether there is something; a name that the file system does not take names nothing."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def _relative_to(path: str) -> str:
    return "" if Path(path).is_absolute() else f", relative to {Path.cwd()}"
