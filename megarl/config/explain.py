"""`megarl config KEY`: what a setting is, from the schema, for every command that has it."""

from __future__ import annotations

import argparse
import json
import textwrap
from difflib import get_close_matches

from pydantic.fields import FieldInfo

from megarl.config.foreign_names import called_here
from megarl.config.introspect import describe_field, fields_at, sections_of, tag_field, tag_of, walk
from megarl.config.renamed import RENAMED
from megarl.config.section import Section
from megarl.errors import UserError
from megarl.jobs import roots


def run(options: argparse.Namespace) -> int:
    """Print it.

    Raises:
        UserError: no command has the key.
    """
    print("\n".join(explain(options.key, options.job)))
    return 0


def explain(key: str, job: str | None = None) -> list[str]:
    """Return the lines that describe ``key``; commands with the same field share them.

    Raises:
        UserError: ``job`` is no command with a configuration, or has no such key.
    """
    known = roots()
    if job is not None and job not in known:
        raise UserError(f"--for: no such command; with a configuration are {', '.join(known)} (got {job!r})")
    asked = {job: known[job]} if job else known
    path = tuple(key.split("."))
    described: dict[tuple[str, ...], list[str]] = {}
    for name, root in asked.items():
        for field in fields_at(root, path):
            described.setdefault(tuple(_describe(key, field)), []).append(name)
    if not described:
        if new := RENAMED.get(key):
            raise UserError(f"{key}: it is called {new} now")
        keys = {".".join(each) for root in asked.values() for each in walk(root)}
        last = {each.rpartition(".")[2]: each for each in sorted(keys)}
        near = [each for each in sorted(keys) if each.endswith(f".{key}")][:3]
        near = near or [each for each in called_here(path[-1]) if each in keys]
        near = near or get_close_matches(key, keys, n=3, cutoff=0.6)
        near = near or [last[each] for each in get_close_matches(path[-1], last, n=3, cutoff=0.7)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{key}: no such setting{hint}")
    lines: list[str] = []
    for text, names in described.items():
        lines += [*([""] if lines else []), *text, f"  of: megarl {', '.join(dict.fromkeys(names))}"]
    return lines


def _describe(key: str, field: FieldInfo) -> list[str]:
    sections = sections_of(field.annotation)
    lines = [key, f"  type: {describe_field(field)}"]
    if field.is_required():
        lines.append("  required")
    else:
        value = field.get_default(call_default_factory=True, validated_data={})
        if not isinstance(value, Section):
            lines.append(f"  default: {json.dumps(value, default=str)}")
    if field.description:
        lines += textwrap.wrap(
            " ".join(field.description.split()), 100, initial_indent="  ", subsequent_indent="  "
        )
    for section in sections:
        tag = f" with {tag_field(section)}: {tag_of(section)}" if tag_of(section) else ""
        lines.append(f"  keys{tag}: {', '.join(section.model_fields)}")
    return lines
