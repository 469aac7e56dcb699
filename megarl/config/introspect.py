"""Introspection of the schema: types in words, and paths of keys.

A path is a tuple of key names from the root, ("optimizer", "lr"); users read it with dots.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megarl.config.section import IS_PATH, Section
from megarl.config.violation import Path

_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_BOUNDS = {
    annotated_types.Ge: ">= {0.ge}",
    annotated_types.Gt: "> {0.gt}",
    annotated_types.Le: "<= {0.le}",
    annotated_types.Lt: "< {0.lt}",
    annotated_types.MinLen: "(not empty)",
}


def leaf_types(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation; unions and Annotated are unwrapped."""
    if get_origin(annotation) is Annotated:
        return leaf_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaf_types(part)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the section classes of a field: none for a plain value, several for a tagged union."""
    return [t for t in leaf_types(annotation) if isinstance(t, type) and issubclass(t, Section)]


def tag_field(section: type[Section]) -> str | None:
    """Return the field that selects a member of a tagged union: ``source`` or ``kind``; else None."""
    return next((name for name in ("source", "kind") if name in section.model_fields), None)


def tag_of(section: type[Section]) -> str | None:
    """Return the (first) tag that selects this member of a tagged union; None for other sections."""
    return next(map(str, tags_of(section)), None)


def tags_of(section: type[Section]) -> tuple[Any, ...]:
    """Return all tags that select this member of a tagged union; () for other sections."""
    name = tag_field(section)
    return () if name is None else get_args(section.model_fields[name].annotation)


def entries_of(annotation: Any) -> Any:
    """Return the annotation of the values in a mapping of sections; None for other types."""
    for leaf in leaf_types(annotation):
        if get_origin(leaf) is dict and sections_of(get_args(leaf)[1]):
            return get_args(leaf)[1]
    return None


def select_section(sections: list[type[Section]], data: Any) -> type[Section] | None:
    """Return the member of a (tagged) union that ``data`` selects; None if it selects none."""
    if len(sections) == 1:
        return sections[0]
    tags = [tag_field(section) for section in sections]
    value = data.get(tags[0]) if isinstance(data, Mapping) and tags and tags[0] is not None else None
    if value is None and isinstance(data, Mapping) and tags[:1] == ["kind"] and "path" in data:
        value = "custom"  # same default as in megarl.config.environments
    return next((section for section in sections if value in tags_of(section)), None)


def accepts_text(annotation: Any) -> bool:
    """Return whether the annotation accepts a string (a Literal of strings counts)."""
    return any(
        leaf is str or (get_origin(leaf) is Literal and all(isinstance(v, str) for v in get_args(leaf)))
        for leaf in leaf_types(annotation)
    )


def is_path(field: FieldInfo) -> bool:
    """Whether a path belongs here: what lies where is no secret, and readers of a run's directory need it."""
    parts = [part for part in get_args(field.annotation) if get_origin(part) is Annotated]
    return any(IS_PATH in metadata for metadata in (field.metadata, *(part.__metadata__ for part in parts)))


def accepts_null(annotation: Any) -> bool:
    """Return whether the annotation accepts null."""
    return type(None) in leaf_types(annotation)


def fields_at(root: type[Section], path: Path) -> list[FieldInfo]:
    """Return the fields at a path (several in a tagged union); [] for unknown or free-form keys."""
    fields = [FieldInfo.from_annotation(root)]
    for name in path:
        fields = _inside(fields, name)
    return fields


def config_path(root: type[Section], location: tuple[int | str, ...]) -> Path:
    """Convert a pydantic error location to a path; drop the union tags that pydantic inserts."""
    fields, path = [FieldInfo.from_annotation(root)], list[str]()
    for part in location:
        members = [section for field in fields for section in sections_of(field.annotation)]
        if len(members) > 1:
            fields = [FieldInfo.from_annotation(member) for member in members if part in tags_of(member)]
        else:
            path.append(str(part))
            fields = _inside(fields, str(part))
    return tuple(path)


def _inside(fields: list[FieldInfo], name: str) -> list[FieldInfo]:
    """Return the fields that ``name`` selects inside ``fields``: of a section, or entries of a mapping."""
    annotations = [field.annotation for field in fields]
    entries = [FieldInfo.from_annotation(entry) for a in annotations if (entry := entries_of(a)) is not None]
    sections = [section for annotation in annotations for section in sections_of(annotation)]
    return entries or [s.model_fields[name] for s in sections if name in s.model_fields]


def walk(root: type[Section], prefix: Path = ()) -> dict[Path, FieldInfo]:
    """Return all keys under ``root``, sections before their fields; in a tagged union the first match."""
    found: dict[Path, FieldInfo] = {}
    for name, field in root.model_fields.items():
        found[(*prefix, name)] = field
        for section in sections_of(field.annotation):
            for path, inner in walk(section, (*prefix, name)).items():
                found.setdefault(path, inner)
    return found


def describe_field(field: FieldInfo) -> str:
    """Describe the type of a field, e.g. 'a number > 0' or "'mean' or 'leave_one_out'"."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [item for e in arguments[1:] for item in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return _describe(arguments[0], extra)
    if sections := sections_of(annotation):
        tags = " or ".join(repr(tag) for section in sections for tag in tags_of(section))
        source = f" with source {tags}" if len(sections) > 1 else ""
        return f"a section{source}" + (" or null" if accepts_null(annotation) else "")
    if (entry := entries_of(annotation)) is not None:
        return f"a mapping of names, each to {_describe(entry)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin is list:
        return f"a list, each {_describe(arguments[0])}"
    if origin is dict:
        return "a mapping"
    bounds = [_BOUNDS[type(bound)].format(bound) for bound in metadata if type(bound) in _BOUNDS]
    return _PLAIN[annotation] + (" " + " and ".join(bounds) if bounds else "")
