"""Tools in the prompt: through the chat template, or in a system message if the template has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megarl.environments.tool_format import ToolFormat
from megarl.environments.tools import schemas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTools:
    """The tools of an environment, and the call format of the model."""

    schemas: list[dict[str, Any]]
    format: ToolFormat

    @classmethod
    def of(cls, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PromptTools:
        """Derive the call format from the tokenizer's chat template.

        Raises:
            UserError: the call format of the template is unknown.
        """

        def render(messages: list[dict[str, Any]], **options: Any) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

        shown = schemas(names)
        return cls(shown, ToolFormat.of(render, shown))

    def put_in(
        self, messages: list[dict[str, str]]
    ) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        """Return the messages and the ``tools`` argument of the template; None if it does not show tools."""
        if self.format.native:
            return messages, self.schemas
        text = self.format.instructions(self.schemas)
        if messages[0]["role"] == "system":
            first = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
            return [first, *messages[1:]], None
        return [{"role": "system", "content": text}, *messages], None
