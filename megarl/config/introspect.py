"""What the schema says about itself: descriptions of types, and paths of keys.

A path is a tuple of key names from the root, ("optimizer", "lr"); users read it with dots.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megarl.config.section import Section
from megarl.config.violation import Path

_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


def leaf_types(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, unions and Annotated taken apart."""
    if get_origin(annotation) is Annotated:
        return leaf_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaf_types(part)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """The section classes a field may hold: none for a plain value, several for a tagged union."""
    return [t for t in leaf_types(annotation) if isinstance(t, type) and issubclass(t, Section)]


def tag_field(section: type[Section]) -> str | None:
    """The field that selects this member of a tagged union: ``source`` of data, ``kind`` of environments."""
    return next((name for name in ("source", "kind") if name in section.model_fields), None)


def tag_of(section: type[Section]) -> str | None:
    """The value of its tag field that selects this member of a tagged union."""
    name = tag_field(section)
    return None if name is None else str(get_args(section.model_fields[name].annotation)[0])


def tags_of(section: type[Section]) -> tuple[Any, ...]:
    """Every value of its tag that selects this member of a tagged union; none for other sections."""
    name = tag_field(section)
    return () if name is None else get_args(section.model_fields[name].annotation)


def entries_of(annotation: Any) -> Any:
    """What the values of a mapping of sections may be (an annotation); None for every other type."""
    for leaf in leaf_types(annotation):
        if get_origin(leaf) is dict and sections_of(get_args(leaf)[1]):
            return get_args(leaf)[1]
    return None


def select_section(sections: list[type[Section]], data: Any) -> type[Section] | None:
    """The member of a (tagged) union that ``data`` asks for; None where it names none."""
    if len(sections) == 1:
        return sections[0]
    tags = [tag_field(section) for section in sections]
    value = data.get(tags[0]) if isinstance(data, Mapping) and tags and tags[0] is not None else None
    if value is None and isinstance(data, Mapping) and tags[:1] == ["kind"] and "path" in data:
        value = "custom"  # as megarl.config.environments has it
    return next((section for section in sections if value in tags_of(section)), None)


def accepts_text(annotation: Any) -> bool:
    """Whether a string is a valid type of value here (a Literal of strings counts)."""
    return any(
        leaf is str or (get_origin(leaf) is Literal and all(isinstance(v, str) for v in get_args(leaf)))
        for leaf in leaf_types(annotation)
    )


def accepts_null(annotation: Any) -> bool:
    """Whether null is a valid value here."""
    return type(None) in leaf_types(annotation)


def fields_at(root: type[Section], path: Path) -> list[FieldInfo]:
    """The fields a path may mean (several in a tagged union); empty for unknown or free-form keys."""
    sections, found = [root], list[FieldInfo]()
    for name in path:
        entries = [entry for field in found if (entry := entries_of(field.annotation)) is not None]
        if entries:  # a name of the user's own
            found = [FieldInfo.from_annotation(entry) for entry in entries]
        else:
            found = [s.model_fields[name] for s in sections if name in s.model_fields]
        sections = [section for field in found for section in sections_of(field.annotation)]
    return found


def config_path(root: type[Section], location: tuple[int | str, ...]) -> Path:
    """A pydantic error location as a path: pydantic inserts the tag of a union, users do not write it."""
    sections: list[type[Section]] = [root]
    fields: list[FieldInfo] = []
    path: list[str] = []
    for part in location:
        if len(sections) > 1:
            sections = [section for section in sections if part in tags_of(section)]
            continue
        path.append(str(part))
        entries = [entry for field in fields if (entry := entries_of(field.annotation)) is not None]
        if entries:
            sections, fields = [section for entry in entries for section in sections_of(entry)], []
            continue
        fields = [s.model_fields[part] for s in sections if isinstance(part, str) and part in s.model_fields]
        sections = [section for field in fields for section in sections_of(field.annotation)]
    return tuple(path)


def walk(root: type[Section], prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every key under ``root``, sections before what they hold, each path once."""
    seen: set[Path] = set()
    for name, field in root.model_fields.items():
        yield (*prefix, name), field
        for section in sections_of(field.annotation):
            for path, inner in walk(section, (*prefix, name)):
                if path not in seen:
                    seen.add(path)
                    yield path, inner


def describe_field(field: FieldInfo) -> str:
    """The type of a field in words, e.g. 'a number > 0' or "'mean' or 'leave_one_out'"."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        unpacked = [item for e in extra for item in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return _describe(inner, unpacked)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = get_args(annotation)
        if sections_of(annotation):
            null = " or null" if accepts_null(annotation) else ""
            return _describe_sections(sections_of(annotation)) + null
        return " or ".join(_describe(part, []) for part in parts)
    if get_origin(annotation) is Literal:
        return " or ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"a list, each {_describe(get_args(annotation)[0], [])}"
    if entries_of(annotation) is not None:
        return f"a mapping of names, each to {_describe(entries_of(annotation), [])}"
    if get_origin(annotation) is dict:
        return "a mapping"
    if sections_of(annotation):
        return _describe_sections(sections_of(annotation))
    return _PLAIN[annotation] + _describe_bounds(metadata)


def _describe_sections(sections: list[type[Section]]) -> str:
    names = " or ".join(f"'{tag}'" for s in sections for tag in tags_of(s)) if len(sections) > 1 else ""
    return f"a section with source {names}" if names else "a section"


def _describe_bounds(metadata: list[Any]) -> str:
    words = []
    for bound in metadata:
        match bound:
            case annotated_types.Ge(ge):
                words.append(f">= {ge}")
            case annotated_types.Gt(gt):
                words.append(f"> {gt}")
            case annotated_types.Le(le):
                words.append(f"<= {le}")
            case annotated_types.Lt(lt):
                words.append(f"< {lt}")
            case annotated_types.MinLen(_):
                words.append("that is not empty")
    return (" " + " and ".join(words)) if words else ""
