"""Read and check fields of a row; errors begin with ``where``, the row's file and line."""

from __future__ import annotations

import json
from typing import Any

from megarl.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_WEIGHT = "weight"  # of OpenAI's fine-tuning format
# Names of ShareGPT's "from", and OpenAI's newer name of the system role.
_SAME_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "observation": "tool",
    "function_response": "tool",
}
_CALLS = "function_call"  # ShareGPT's turn of the assistant that holds calls as JSON


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


def get_messages(
    record: dict[str, Any], name: str, where: str, *, weighted: bool = False
) -> list[dict[str, Any]]:
    """Return a field that must be a list of chat messages, each with a role and a text.

    An assistant message may have tool_calls, with or without text; null fields are removed. ShareGPT's
    messages ("from", "value") become such ones, and OpenAI's list of text parts a text. With ``weighted`` an
    assistant message may have OpenAI's weight; only 0 is kept, for 1 is the default.
    """
    value = get_field(record, name, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {name!r} must be a list of chat messages and not empty")
    return [_message(each, f"{where}: {name}[{number}]", weighted) for number, each in enumerate(value)]


def _message(message: Any, at: str, weighted: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f'{at} must be an object with "role" and "content"')
    message = _as_openai({key: value for key, value in message.items() if value is not None}, at)
    weight = message.pop(_WEIGHT, 1) if weighted else 1
    calls = message.get("tool_calls")
    if "role" not in message or ("content" not in message and not calls):
        raise UserError(f'{at} must be an object with "role" and "content" (or "tool_calls")')
    if unknown := [key for key in message if key not in _MESSAGE_FIELDS]:
        raise UserError(f"{at} has {unknown[0]!r}; known are {', '.join(_MESSAGE_FIELDS)}")
    if message["role"] not in _ROLES:
        raise UserError(f"{at}.role is {message['role']!r}; known roles are {', '.join(_ROLES)}")
    if type(weight) not in (int, float) or weight not in (0, 1):
        raise UserError(f"{at}.weight must be 0 (not learned) or 1 (got {json.dumps(weight)})")
    if weight == 0:
        if message["role"] != "assistant":
            raise UserError(
                f"{at}.weight: only the assistant's messages are learned (got {message['role']!r})"
            )
        message[_WEIGHT] = 0
    message.setdefault("content", "")
    if isinstance(message["content"], list):
        message["content"] = _joined(message["content"], at)
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


def _as_openai(message: dict[str, Any], at: str) -> dict[str, Any]:
    """Return a message of ShareGPT with "role" and "content", and roles by their usual names."""
    if "from" in message or "value" in message:
        if missing := [name for name in ("from", "value") if name not in message]:
            has = ", ".join(map(repr, message))
            raise UserError(
                f"{at}: a ShareGPT message has 'from' and 'value'; this one lacks {missing[0]!r}"
                f" (it has {has})"
            )
        message = {"role": message["from"], "content": message["value"]} | {
            key: value for key, value in message.items() if key not in ("from", "value")
        }
        if message["role"] == _CALLS:
            return {"role": "assistant", "tool_calls": _parsed_calls(message["content"], at)}
    role = message.get("role")
    if isinstance(role, str) and role not in _ROLES and role in _SAME_ROLES:
        message["role"] = _SAME_ROLES[role]
    return message


def _parsed_calls(value: Any, at: str) -> list[dict[str, Any]]:
    """Return the calls that a message of role function_call writes as JSON, one object or a list."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at}: the calls are not valid JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f'{at}: a {_CALLS} holds an object with "name" and "arguments", or a list of them')
    return [{"type": "function", "function": call} for call in calls]


def _joined(parts: list[Any], at: str) -> str:
    """Return the text of OpenAI's content parts."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{at}.content: only parts of type text are supported (got {kind!r})")
    return "".join(part["text"] for part in parts)


def as_messages(value: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """Return a text as a conversation of one message; a conversation unchanged."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def get_text_or_messages(
    record: dict[str, Any], name: str, where: str, *, weighted: bool = False
) -> str | list[dict[str, Any]]:
    """Return a field that must be a text or a list of chat messages, as :func:`get_messages`."""
    if isinstance(get_field(record, name, where), list):
        return get_messages(record, name, where, weighted=weighted)
    return get_text(record, name, where)


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
