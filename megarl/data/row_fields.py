"""Read and check fields of a row; errors begin with ``where``, the row's file and line."""

from __future__ import annotations

import json
from typing import Any

from megarl.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def get_field(record: dict[str, Any], name: str, where: str) -> Any:
    """Return ``record[name]``; if it is missing, raise UserError with the existing fields."""
    if name not in record:
        raise UserError(f"{where}: no field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def get_text(record: dict[str, Any], name: str, where: str) -> str:
    """Return a field that must be a non-empty string."""
    value = get_field(record, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: field {name!r} is empty")
    return value


def get_messages(record: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Return a field that must be a list of chat messages, each with a role and a text.

    An assistant message may have tool_calls, with or without text; null fields are removed.
    """
    value = get_field(record, name, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {name!r} must be a list of chat messages and not empty")
    return [_message(message, f"{where}: {name}[{position}]") for position, message in enumerate(value)]


def _message(message: Any, at: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f'{at} must be an object with "role" and "content"')
    message = {key: value for key, value in message.items() if value is not None}
    calls = message.get("tool_calls")
    if "role" not in message or ("content" not in message and not calls):
        raise UserError(f'{at} must be an object with "role" and "content" (or "tool_calls")')
    if unknown := [key for key in message if key not in _MESSAGE_FIELDS]:
        raise UserError(f"{at} has {unknown[0]!r}; known are {', '.join(_MESSAGE_FIELDS)}")
    if message["role"] not in _ROLES:
        raise UserError(f"{at}.role is {message['role']!r}; known roles are {', '.join(_ROLES)}")
    message.setdefault("content", "")
    if not isinstance(message["content"], str):
        raise UserError(f"{at}.content must be a string, found {type(message['content']).__name__}")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError(f"{at}.tool_calls must be a list of objects")
        if message["role"] != "assistant" and calls:
            raise UserError(f"{at}.tool_calls: only the assistant calls tools, found {message['role']!r}")
        message["tool_calls"] = [_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if not calls:
            del message["tool_calls"]
    return message


def _call(call: dict[str, Any], at: str) -> dict[str, Any]:
    """Return the tool call with its arguments as an object; OpenAI's API writes them as JSON text."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], f"{at}.function")}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{at}.arguments is not valid JSON: {error}") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError(f"{at}.arguments must be an object, found {type(arguments).__name__}")
    return call if arguments is None else {**call, "arguments": arguments}
