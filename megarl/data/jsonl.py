"""Reading JSONL files with errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarl.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")


def read_jsonl(path: str, field: str) -> list[tuple[int, dict[str, Any]]]:
    """All objects of a JSONL file with their line numbers (from 1); blank lines are skipped.

    Args:
        path: the file.
        field: its configuration key, e.g. ``data.train.path``.

    Raises:
        UserError: missing or unreadable file, a line that is not a JSON object, no objects at all.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{field}: no file {path}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{field}: cannot read {path}: {error.strerror}") from error
    records = []
    # Not splitlines(): JSON strings may hold U+2028 and others that it would split at.
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: malformed JSON at column {error.colno}: {error.msg}"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        records.append((number, record))
    if not records:
        raise UserError(f"{field}: {path} holds no records")
    return records


def get_field(record: dict[str, Any], name: str, where: str) -> Any:
    """``record[name]``, or a UserError that names the fields there are; ``where`` is file:line."""
    if name not in record:
        raise UserError(f"{where}: no field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def get_text(record: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a string with something in it."""
    value = get_field(record, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: field {name!r} is empty")
    return value


def get_messages(record: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    """A field that must be a list of chat messages, each with a role and a text."""
    value = get_field(record, name, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {name!r} must be a list of chat messages and not empty")
    for position, message in enumerate(value):
        at = f"{where}: {name}[{position}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f'{at} must be an object with exactly "role" and "content"')
        if message["role"] not in _ROLES:
            raise UserError(f"{at}.role is {message['role']!r}; known roles are {', '.join(_ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"{at}.content must be a string, found {type(message['content']).__name__}")
    return value
