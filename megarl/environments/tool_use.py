"""The tool loop: the model calls tools, reads their results, and answers."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Environment, Observation, StepResult
from megarl.environments.tool_format import ToolFormat
from megarl.environments.tools import ToolError, make_tools

if TYPE_CHECKING:
    from megarl.config.environments import ToolsConfig
    from megarl.records import Prompt

_MAX_RESULT = 4000


class ToolUseEnvironment:
    """A turn with a tool call gets the tool's result; a turn without one is the answer and is scored.

    Calls are parsed in the model's format (``metadata["tool_format"]``). An invalid call, an unknown tool
    or wrong arguments get an error message. The reward of the answer is that of the inner environment
    (``judge``); a turn with a call gets 0, or ``-error_penalty`` if it was invalid. ``info`` adds
    ``tool_calls`` and ``tool_errors``.
    """

    raw_actions = True  # some models mark calls with special tokens
    max_concurrency = 8

    def __init__(self, config: ToolsConfig, judge: Environment, field: str = "environment") -> None:
        self._config = config
        self._tools = {tool.name: tool for tool in make_tools(config, field)}
        self.note = "; ".join(tool.note for tool in self._tools.values() if tool.note)
        self._judge = judge
        self._prompt: Prompt | None = None
        self._format = ToolFormat()
        self._calls = self._errors = 0

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode on ``prompt``."""
        self._prompt, self._calls, self._errors = prompt, 0, 0
        self._format = ToolFormat(**prompt.metadata.get("tool_format", {}))
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        """Process the policy's turn."""
        assert self._prompt is not None, "step() before reset()"
        call = self._format.call_in(action)
        if call is None:
            judge: Any = copy.copy(self._judge)
            await judge.reset(self._prompt)
            result: StepResult = await judge.step(action)
            info = result.info | {"tool_calls": self._calls, "tool_errors": self._errors}
            return StepResult(None, result.reward, True, info)
        self._calls += 1
        try:
            if isinstance(call, str):
                raise ToolError(call)
            name, arguments = call
            if name not in self._tools:
                raise ToolError(f"no tool {name!r}; there are {', '.join(self._tools)}")
            text = await asyncio.to_thread(self._tools[name].run, arguments)
            reward = 0.0
        except ToolError as error:
            self._errors += 1
            text, reward = f"Error: {error}", -self._config.error_penalty
        info = {"tool_calls": self._calls, "tool_errors": self._errors}
        return StepResult(Observation(text[:_MAX_RESULT], self._config.role), reward, False, info)
