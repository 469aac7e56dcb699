"""Read and write YAML 1.2: core schema, line numbers, environment variables.

PyYAML reads YAML 1.1, where ``1e-5`` is a string and ``off`` a boolean, and a repeated key silently wins.
Here numbers, booleans and null follow the YAML 1.2 core schema (section 10.3.2 of its specification),
repeated keys are errors, and the line of every key is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from megarl.config.violation import Path, show
from megarl.errors import UserError

_CORE_SCHEMA: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: _integer(text)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    ),
}
MAX_BYTES = 512 * 2**10
"""Largest text that is parsed. PyYAML takes 30 us per value."""
_MAX_VALUES = 100_000  # that aliases may expand to
_TAG = "tag:yaml.org,2002:"
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


def _integer(text: str) -> int:
    if len(text) > 1000:  # Python's own limit depends on how it was started
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, 0 if text[1:2] in ("o", "x") else 10)


class _TooMuchError(Exception):
    """A text that says more than a configuration does."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _name, (_pattern, _) in _CORE_SCHEMA.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [None])
# Other programs may read this output as YAML 1.1: quote strings that YAML 1.1 reads as booleans.
_Dumper.add_implicit_resolver(_TAG + "bool", re.compile("^(?:y|n|yes|no|on|off)$", re.IGNORECASE), [None])


_FAILED = object()  # value of a key with a problem; its parent omits it


@dataclass
class YamlText:
    """A parsed document: its value, the line of every key, and the problems of single keys.

    Keys in ``problems`` are absent from ``value``. The path element of a list item is its index.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[Path, int, str]] = field(default_factory=list)
    written: dict[Path, str] = field(default_factory=dict)
    """Texts into which variables of the environment went, as they stood in the file."""
    expand: bool = True
    _open: set[yaml.Node] = field(default_factory=set)
    _num_values: int = 0

    def _fail(self, path: Path, line: int, problem: str) -> object:
        self.problems.append((path, line, problem))
        return _FAILED

    def _read(self, node: yaml.Node, path: Path, line: int) -> Any:
        """Return the value of a node; record lines and problems."""
        self.lines.setdefault(path, line)
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise _TooMuchError(f"aliases (*) expand it to more than {_MAX_VALUES} values")
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node, path, line)
        if node in self._open:
            return self._fail(path, line, "an alias (*) inside its own anchor (&)")
        self._open.add(node)
        if isinstance(node, yaml.MappingNode):
            value: Any = self._read_mapping(node, path)
        else:
            lines = [item.start_mark.line + 1 for item in node.value]
            items = [self._read(item, (*path, str(i)), lines[i]) for i, item in enumerate(node.value)]
            value = [item for item in items if item is not _FAILED]
        self._open.discard(node)
        return value

    def _read_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line, key = key_node.start_mark.line + 1, key_node.value
            if key_node.tag != _TAG + "str":
                shown = key if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._fail((*path, shown), line, "keys must be strings; put it in quotes")
            elif key in first_line:
                self._fail((*path, key), line, f"given twice, first on line {first_line[key]}")
            else:
                first_line[key] = line
                value[key] = self._read(value_node, (*path, key), line)
        return {key: item for key, item in value.items() if item is not _FAILED}

    def _read_scalar(self, node: yaml.ScalarNode, path: Path, line: int) -> Any:
        text, tag = node.value, str(node.tag)
        try:
            if "${" in text and self.expand:
                text = expand_variables(text)
                if node.style is None:  # unquoted: the type is that of the text as if written in place
                    tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))
            if (name := tag.removeprefix(_TAG)) in _CORE_SCHEMA:
                pattern, read = _CORE_SCHEMA[name]
                if re.fullmatch(pattern, text) is None:
                    return self._fail(path, line, f"!!{name} on what is none (got {show(text)})")
                return read(text)
            if name == "str":
                if text != node.value and names_variables(node.value):
                    self.written[path] = node.value
                return check_text(text)
            return self._fail(path, line, f"unknown YAML tag {tag}")
        except ValueError as error:
            return self._fail(path, line, str(error))


def parse_yaml(text: str, name: str, *, expand: bool = True) -> YamlText:
    """Parse one YAML document; ``name`` is the file's, for syntax errors (UserError, with the line).

    Without ``expand`` ${NAME} stays as it is written.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        why = " ".join(filter(None, parts)) or " ".join(str(error).split())
        where = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{name}{where}: not valid YAML: {why}") from None
    except RecursionError:
        raise UserError(f"{name}: its values are nested too deeply") from None
    parsed = YamlText(expand=expand)
    try:
        if node is not None:
            parsed.value = parsed._read(node, (), node.start_mark.line + 1)
    except _TooMuchError as error:
        raise UserError(f"{name}: {error}") from None
    except RecursionError:
        raise UserError(f"{name}: its values are nested too deeply") from None
    return parsed


def check_text(text: str) -> str:
    """``text`` itself.

    Raises:
        ValueError: it holds what no file name, prompt or option can.
    """
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode("utf-8", "surrogateescape")  # bytes of a file name that are no UTF-8 are good ones
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    return text


def dump_yaml(value: Any) -> str:
    """Return YAML that :func:`parse_yaml` reads back as ``value``."""
    return yaml.dump(_escape(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def expand_variables(text: str) -> str:
    """Replace ${NAME} and ${NAME:-default} by environment variables; $${ becomes ${.

    Raises:
        ValueError: a variable without default is unset, or ${ is not followed by a valid name.
    """

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if match.group().startswith("$$"):
            return "${"
        if name is None:
            raise ValueError("'${' does not start ${NAME} or ${NAME:-default}; write $${ for a literal ${")
        value = os.environ.get(name)
        if default is not None:
            return value or default  # as in a shell, :- also replaces an empty value
        if value is None:
            raise ValueError(f"environment variable {name} is not set")
        return value

    return _VARIABLE.sub(replace, text)


class AsWritten(str):
    """A text with ${NAME} in it that is written out as it stands, for the environment to fill in again."""


def names_variables(text: str) -> list[str]:
    """The NAMEs of every ${NAME} in ``text``; $${ is a plain one."""
    return [match.group(1) for match in _VARIABLE.finditer(text) if match.group(1)]


def _escape(value: Any) -> Any:
    match value:
        case AsWritten():
            return str(value)
        case str():
            return value.replace("${", "$${")
        case dict():
            return {key: _escape(item) for key, item in value.items()}
        case list() | tuple():
            return [_escape(item) for item in value]
    return value
