"""Load a configuration: YAML file, key=value overrides, schema, rules, files.

All violations are collected and reported together, one line each, with file and line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megarl.config import hub
from megarl.config.files import find_file_violations
from megarl.config.introspect import (
    accepts_null,
    accepts_text,
    config_path,
    describe_field,
    fields_at,
    is_path,
    leaf_types,
    sections_of,
    select_section,
    tag_field,
    tags_of,
)
from megarl.config.section import SAID_ITSELF, Section, find_violations
from megarl.config.suggest import REPLACED, explain_unknown
from megarl.config.violation import Origins, Path, Violation, dotted, show
from megarl.config.yaml_text import (
    MAX_BYTES,
    AsWritten,
    YamlText,
    check_text,
    dump_yaml,
    expand_variables,
    names_variables,
    parse_yaml,
)
from megarl.errors import UserError

_Config = TypeVar("_Config", bound=Section)
_COMMAND_LINE = "command line"
_LEAST_HIDDEN = 4  # characters: shorter ones are no keys, and stand in other words
_NO_VALUE = object()


def load_config(
    kind: type[_Config],
    path: str | FilePath | None,
    overrides: Sequence[str] = (),
    *,
    check_files: bool = True,
    check_weights: bool = True,
    num_processes: int | None = None,
) -> _Config:
    """Read ``path``, apply ``overrides`` ("optimizer.lr=1e-5"), and validate.

    Args:
        kind: the command's root, e.g. SftConfig.
        path: YAML file; strings may contain ${NAME} and ${NAME:-default}. None: overrides only.
        overrides: dotted key=value pairs, later ones win. For a string field the value is taken literally
            (quotes allow YAML escapes), else it is parsed as YAML.
        check_files: also check the files it names, relative to the current directory.
        check_weights: with check_files, also check model weights, and models other than model.path.
        num_processes: trainer ranks set by a launcher (WORLD_SIZE); replaces parallel.num_processes.

    Raises:
        UserError: one line per violation: "field.path: explanation (got value) [file:line]".
    """
    loading = _Loading(kind, None if path is None else FilePath(path), check_files, check_weights)
    return loading.load(overrides, num_processes)


def dump_config(config: Section) -> str:
    """Return YAML with every field resolved; :func:`load_config` reads it back as an equal configuration."""
    return dump_yaml(public(config))


def public(config: Section) -> dict[str, Any]:
    """Every field as plain data (JSON's types), as files, logs and services may have it.

    Texts into which variables of the environment went are those of the file, ${NAME}: they may be keys and
    passwords. Paths, numbers and truth values are resolved.
    """
    data = config.model_dump(mode="json")
    for path, text in config._written.items():
        place: Any = data
        try:
            for name in path[:-1]:
                place = place[name] if isinstance(place, dict) else place[int(name)]
            last: Any = path[-1] if isinstance(place, dict) else int(path[-1])
            if isinstance(place[last], str):
                place[last] = AsWritten(text)
        except (KeyError, IndexError, TypeError, ValueError):  # a default has taken its place
            continue
    return data


class _Loading:
    """State of one load_config call: the raw data and the violations found."""

    def __init__(
        self, kind: type[Any], path: FilePath | None, check_files: bool, check_weights: bool
    ) -> None:
        self.kind, self.path = kind, path
        self.check_files, self.check_weights = check_files, check_weights
        self.data: dict[str, Any] = {}
        self.origins = Origins(_COMMAND_LINE if path is None else str(path))
        self.violations: list[Violation] = []
        self.written: dict[Path, str] = {}

    def load(self, overrides: Sequence[str], num_processes: int | None) -> Any:
        if self.path is not None:
            self.read_file(self.path)
        for override in overrides:
            self.apply_override(override)
        if num_processes is not None:
            self.set_value(("parallel", "num_processes"), num_processes, "WORLD_SIZE")
        config = self.check()
        if self.violations:
            raise UserError("\n".join(map(self.hide, self.origins.report(self.violations))))
        config._written = {at: text for at, text in self.written.items() if not self.is_path(at)}
        return config

    def is_path(self, at: Path) -> bool:
        """Whether a field holds a path."""
        return any(map(is_path, fields_at(self.kind, at)))

    def hide(self, line: str) -> str:
        """A line without what variables of the environment have put into it."""
        for at, written in self.written.items():
            if self.is_path(at):
                continue
            known = {expand_variables(written): written}
            known |= {os.environ.get(name, ""): f"${{{name}}}" for name in names_variables(written)}
            for filled, instead in known.items():
                for form in (filled, show(filled)):  # the latter is shortened
                    if len(form) >= _LEAST_HIDDEN:
                        line = line.replace(form, instead)
        return line

    def note_variables(self, parsed: YamlText, at: Path = ()) -> None:
        """Remember where variables were filled in, below ``at``, and what stood there."""
        self.written = {p: text for p, text in self.written.items() if p[: len(at)] != at or not at}
        for inner, text in parsed.written.items():
            self.written[(*at, *inner)] = text

    def read_file(self, path: FilePath) -> None:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a UTF-8 text file ({error.reason})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES // 2**10} KiB: not a configuration")
        parsed = parse_yaml(text, str(path))
        self.note_variables(parsed)
        self.origins.places = {p: f"{path}:{line}" for p, line in parsed.lines.items() if p}
        for at, line, problem in parsed.problems:
            self.violations.append(Violation(at, problem))
            self.origins.places[at] = f"{path}:{line}"
        if parsed.value is not None and not isinstance(parsed.value, dict):
            got = show(parsed.value)
            raise UserError(f"{path}: a configuration must be a mapping of sections (got {got})")
        self.data = parsed.value or {}

    def apply_override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            wrong = f"an override has the form section.key=value (got {show(override)})"
            return self.fail_override((override,), wrong)
        try:
            parsed = self.read_override(path, text)
        except (ValueError, UserError) as error:
            why = re.sub(f"^{_COMMAND_LINE}(:\\d+)?: ", "", str(error))
            return self.fail_override(path, f"{why} (got {show(text)})")
        for inner, _, problem in parsed.problems:
            self.fail_override((*path, *inner), problem)
        if not parsed.problems:
            self.set_value(path, parsed.value, _COMMAND_LINE)
            self.note_variables(parsed, path)
        return None

    def read_override(self, path: Path, text: str) -> YamlText:
        annotations = [field.annotation for field in fields_at(self.kind, path)]
        is_null = text in ("null", "~") and any(map(accepts_null, annotations))
        is_bool = text in ("true", "false") and any(bool in leaf_types(each) for each in annotations)
        plain = not is_null and not is_bool and not text.startswith(('"', "'"))
        if any(map(accepts_text, annotations)) and plain:
            written: dict[Path, str] = {(): text} if names_variables(text) else {}
            return YamlText(check_text(expand_variables(text)), written=written)
        return parse_yaml(text, _COMMAND_LINE)

    def fail_override(self, path: Path, message: str) -> None:
        self.origins.overwrite(path, _COMMAND_LINE)
        self.violations.append(Violation(path, message))

    def set_value(self, path: Path, value: Any, place: str) -> None:
        section = self.data
        for depth, name in enumerate(path[:-1], start=1):
            inner = section.get(name)
            if inner is None:
                inner = section[name] = {}
            if not isinstance(inner, dict):
                what = f"{dotted(path[:depth])} is a value, not a section"
                return self.fail_override(path, f"{what} (got {show(inner)})")
            section = inner
        section[path[-1]] = value
        # The override replaces the file's value, so violations of that value no longer apply.
        self.violations = [v for v in self.violations if v.path[: len(path)] != path]
        self.origins.overwrite(path, place)
        return None

    def check(self) -> Any:
        failed = {v.path for v in self.violations}
        try:
            config: Section = self.kind.model_validate(self.data)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                violation = self.translate(detail)
                if violation.path not in failed:
                    self.violations.append(violation)
                failed.add(violation.path)
        if failed:
            config = _build_partial(self.kind, self.data, failed, ())
        self.violations += find_violations(config, partial=bool(failed))
        if self.check_files:
            if not self.violations:  # nothing is downloaded for a configuration that cannot run
                config, missing = hub.resolve(config)
                self.violations += [Violation(path, message) for path, message in missing]
            self.violations += find_file_violations(config, weights=self.check_weights)
        return config

    def translate(self, detail: ErrorDetails) -> Violation:
        path = config_path(self.kind, detail["loc"])
        if detail["type"] == "extra_forbidden":
            return Violation(path, explain_unknown(self.kind, path, self.value_at(path[:-1])))
        fields = fields_at(self.kind, path)
        expected = describe_field(fields[0]) if fields else "a mapping of sections"
        if detail["type"] == "missing":
            sections = sections_of(fields[0].annotation)
            about = fields[0].description or (sections[0].__doc__ or "").strip()
            return Violation(path, f"required but missing: {expected}. {about}{_needs(path, sections)}")
        if detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
            sections = sections_of(fields[0].annotation)
            tags = " or ".join(repr(tag) for section in sections for tag in tags_of(section))
            tag = tag_field(sections[0]) or "source"
            source = self.value_at((*path, tag))
            if source is _NO_VALUE:
                return Violation((*path, tag), f"required but missing: {tags}")
            instead = f"; {REPLACED[source]}" if isinstance(source, str) and source in REPLACED else ""
            return Violation((*path, tag), f"expected {tags}{instead} (got {show(source)})")
        if detail["type"] == SAID_ITSELF:
            return Violation(path, f"{detail['msg']} (got {show(detail['input'])})")
        if detail["loc"] and not fields:  # inside a free mapping
            return Violation(path, f"{detail['msg'].lower()} (got {show(detail['input'])})")
        return Violation(path, f"expected {expected} (got {show(detail['input'])})")

    def value_at(self, path: Path) -> Any:
        value: Any = self.data
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return _NO_VALUE
            value = value[name]
        return value


def _needs(path: Path, sections: list[type[Section]]) -> str:
    """Say which keys a missing section must have, unless it is one of several kinds."""
    fields = sections[0].model_fields.items() if len(sections) == 1 else ()
    needed = [".".join((*path, name)) for name, field in fields if field.is_required()]
    return f" It needs {', '.join(needed)}." if needed else ""


def _as_read(field: FieldInfo, value: Any) -> Any:
    """A valid value as the schema has it: short names are expanded."""
    for each in field.metadata:
        if isinstance(each, BeforeValidator):
            value = each.func(value)  # type: ignore[call-arg]
    return value


def _build_partial(kind: type[Section], data: dict[str, Any], failed: set[Path], at: Path) -> Section:
    """Build ``kind`` from ``data`` without the fields that failed; reading one raises AttributeError.

    Rules that need none of them still run, so all violations are reported together.
    """
    values: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        path = (*at, name)
        if path in failed:
            continue
        sections = sections_of(field.annotation)
        if name not in data:
            if not field.is_required():
                values[name] = field.get_default(call_default_factory=True, validated_data={})
        elif sections and isinstance(data[name], dict):
            chosen = select_section(sections, data[name])
            if chosen is not None:
                values[name] = _build_partial(chosen, data[name], failed, path)
        else:
            values[name] = _as_read(field, data[name])
    section = kind.model_construct(**values)
    for name in kind.model_fields.keys() - values.keys():
        vars(section).pop(name, None)  # model_construct fills in defaults
    return section
