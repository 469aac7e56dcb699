"""Rules about data: training and held-out data apart, mixtures, filters.

See :mod:`megarl.config.validate` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

from megarl.config.data import FILE_KINDS, FileLocation, HfLocation, MixtureWeights, ReasoningGymSource
from megarl.config.derived import AnyConfig
from megarl.config.introspect import Path
from megarl.config.schema import EnvironmentSource, EvalConfig
from megarl.config.violation import Violation

Violations = Iterator[Violation]


def parts_of(source: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The plain sources of a source, each with its place in the configuration; itself where it is plain."""
    if isinstance(source, MixtureWeights):
        for name, part in getattr(source, "sources", {}).items():
            yield (*path, "sources", name), part
    elif source is not None:
        yield path, source


def curricula_of(config: Any, split: str) -> list[Path]:
    """Where the sources of a split ask for levels that rise."""
    found = parts_of(getattr(config.data, split), ("data", split))
    return [(*path, "curriculum") for path, part in found if getattr(part, "curriculum", None) is not None]


def _system_prompt(config: AnyConfig) -> Violations:
    form = config.data.format
    if form.system_prompt is not None and not form.chat_template:
        yield Violation(
            ("data", "format", "system_prompt"),
            "only a chat template has a place for it, and data.format.chat_template is false",
            (("data", "format", "chat_template"),),
        )


def _separate_sets(config: AnyConfig) -> Violations:
    for train_path, train in parts_of(config.data.train, ("data", "train")):
        for path, held_out in parts_of(config.data.held_out, ("data", "held_out")):
            yield from _separate(train_path, train, path, held_out)


def _separate(train_path: Path, train: Any, path: Path, held_out: Any) -> Violations:
    where = ".".join(train_path)
    made = ReasoningGymSource | EnvironmentSource
    if isinstance(train, made) and isinstance(held_out, made):
        first = max(train.seed, held_out.seed)
        last = min(train.seed + train.size, held_out.seed + held_out.size)
        if _task_of(train) == _task_of(held_out) and first < last:
            # reasoning-gym makes problem i from the seed `seed + i`, so seeds close by share problems,
            # and with other arguments still random streams.
            yield Violation(
                (*path, "seed"),
                f"{last - first} problems would be in both {where} and data.held_out: problem i depends on"
                f" seed + i only; use a seed >= {train.seed + train.size} (got {held_out.seed})",
                ((*train_path, "seed"), (*train_path, "size")),
            )
    elif isinstance(train, FileLocation) and isinstance(held_out, FileLocation):
        if train.path == held_out.path:
            message = f"is the same file as {where}.path (got {held_out.path!r})"
            yield Violation((*path, "path"), message, ((*train_path, "path"),))
    elif (
        isinstance(train, HfLocation)
        and isinstance(held_out, HfLocation)
        and _place(train) == _place(held_out)
    ):
        message = f"is the same split of the same dataset as {where} (got {held_out.split!r})"
        yield Violation((*path, "split"), message, ((*train_path, "split"), (*path, "dataset")))


def _task_of(source: ReasoningGymSource | EnvironmentSource) -> str:
    return source.task if isinstance(source, ReasoningGymSource) else f"kind {source.environment.kind}"


def _place(source: HfLocation) -> tuple[str | None, ...]:
    return source.dataset, source.subset, source.split, source.revision


def _file_kinds(config: AnyConfig) -> Violations:
    for split in ("train", "held_out"):
        for path, source in parts_of(getattr(config.data, split), ("data", split)):
            by_name = isinstance(source, FileLocation) and source.source == "file"
            if by_name and PurePath(source.path).suffix.lower() not in FILE_KINDS:
                yield Violation(
                    (*path, "path"),
                    f"its name must end in {', '.join(FILE_KINDS)}: that says how it is read"
                    f" (got {source.path!r})",
                )


def _mixtures(config: AnyConfig) -> Violations:
    for split in ("train", "held_out"):
        source = getattr(config.data, split)
        if not isinstance(source, MixtureWeights) or source.weights is None:
            continue
        path, names = ("data", split, "weights"), set(getattr(source, "sources", {}))
        if split == "held_out" or isinstance(config, EvalConfig):
            yield Violation(path, "held-out data is measured as it is: leave the weights out")
        elif names != set(source.weights):
            wrong = ", ".join(sorted(names ^ set(source.weights)))
            yield Violation(
                path, f"must give each of the sources a weight, and nothing else (they differ in {wrong})"
            )


def _lengths(config: AnyConfig) -> Violations:
    low, high = config.data.filter.min_tokens, config.data.filter.max_tokens
    if low is not None and high is not None and low > high:
        yield Violation(
            ("data", "filter", "min_tokens"),
            f"larger than data.filter.max_tokens = {high}: nothing would be left (got {low})",
            (("data", "filter", "max_tokens"),),
        )


DATA_RULES: list[Callable[[AnyConfig], Violations]] = [
    _system_prompt,
    _separate_sets,
    _file_kinds,
    _mixtures,
    _lengths,
]
