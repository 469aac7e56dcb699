"""The format of a model's tool calls, derived from its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megarl.errors import UserError

Render = Callable[..., str]
"""``render(messages, tools=..., add_generation_prompt=...)``: the tokenizer's chat template, as text."""

_NAME, _KEY = "megarl_probe_name", "megarl_probe_key"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Format of a call: ``marker``, then a JSON object with the tool's name and arguments under these keys.

    ``native``: it is the format of the model's template; else it is Hermes', which most models know, and the
    prompt must describe the tools.
    """

    marker: str = "<tool_call>"
    name_key: str = "name"
    arguments_key: str = "arguments"
    native: bool = False

    @classmethod
    def of(cls, render: Render, tools: list[dict[str, Any]]) -> ToolFormat:
        """Derive the format of a template.

        Raises:
            UserError: the template supports tools, but its calls are not JSON objects.
        """
        user = {"role": "user", "content": "x"}
        if render([user], tools=tools, add_generation_prompt=True) == render(
            [user], add_generation_prompt=True
        ):
            return cls()
        call = {"type": "function", "function": {"name": _NAME, "arguments": {_KEY: 1}}}
        said = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = render(said, tools=tools, add_generation_prompt=False)
        head = render([user], tools=tools, add_generation_prompt=True)
        begin = len(head) if text.startswith(head) else 0
        decoder = json.JSONDecoder()
        for start in range(text.find(_NAME, begin), begin - 1, -1):
            if text[start] != "{":
                continue
            try:
                found, _ = decoder.raw_decode(text, start)
            except ValueError:
                continue
            names = [key for key, value in found.items() if value == _NAME]
            arguments = [key for key, value in found.items() if isinstance(value, dict) and _KEY in value]
            if names and arguments:
                marker = text[begin:start].strip().removesuffix("[").strip() if begin else ""
                return cls(marker, names[0], arguments[0], native=True)
        raise UserError(
            "data.format.chat_template: the model's template has an unknown format of tool calls:"
            f" {text[begin:][:200]!r}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for prompt metadata; ``ToolFormat(**value)`` restores it."""
        return asdict(self)

    def call_in(self, text: str) -> tuple[str, dict[str, Any]] | str | None:
        """Return the first call of a turn: (name, arguments), or an error message; None without a call."""
        if self.marker:
            _, marker, rest = text.partition(self.marker)
            if not marker:
                return None
        else:
            rest = text
            if not text.lstrip().startswith("{"):
                return None
        start = rest.find("{")
        if start < 0:
            return "a tool call without a JSON object"
        try:
            found, _ = json.JSONDecoder().raw_decode(rest, start)
        except ValueError as error:
            return f"a tool call that is not JSON: {error}"
        name, arguments = found.get(self.name_key), found.get(self.arguments_key, {})
        if isinstance(arguments, str):  # some models write the arguments as JSON text
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return "tool arguments that are not JSON"
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return f"a tool call without {self.name_key!r} or with {self.arguments_key!r} that is no object"
        return name, arguments

    def instructions(self, tools: list[dict[str, Any]]) -> str:
        """Return a system message for models whose template does not support tools."""
        listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
        example = json.dumps({self.name_key: "NAME", self.arguments_key: {"KEY": "VALUE"}})
        return (
            f"You can use these tools:\n{listed}\nTo use one, write {self.marker}{example}</tool_call> and"
            " stop: the next message has its result."
        )
