"""Token ids between two turns of the policy: the end of its message, the observation, the next prompt.

Tokens of earlier turns are never re-tokenised. Only the environment's text is tokenised, once, with the
markup that the chat template puts around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megarl.data.control_tokens import control_tokens, protect, tokenize
from megarl.errors import UserError
from megarl.records import TokenIds, token_ids

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase

# Placeholder for the policy's message while rendering; occurs in no template and no text.
_MARK = "\u2063megarl\u2063turn\u2063"


class ChatContinuation:
    """Convert observations to token ids.

    Args:
        tokenizer: the model's.
        stop_token_ids: tokens that end a turn; the engine keeps the stop token on the sampled ids.
        chat_template: True if prompts are chats; otherwise observations are appended as bare text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int], *, chat_template: bool
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat_template
        self._stops = frozenset(stop_token_ids)

    def check(self, role: str) -> None:
        """Render one observation of ``role``; raise UserError if the template cannot."""
        if self._chat:
            self._rendered_after(role, "x")

    def observation(self, sampled: TokenIds, role: str, text: str) -> TokenIds:
        """Return the token ids that follow ``sampled``, the policy's turn, up to where it speaks again.

        A truncated turn is first closed the way the template closes a message.
        """
        text = self._protected(role, text)
        if self._chat:
            text = self._rendered_after(role, text)
            if len(sampled) and (last := int(sampled[-1])) in self._stops:
                end = str(self._tokenizer.decode([last], skip_special_tokens=False))
                text = text.removeprefix(end)
        return token_ids(tokenize(self._tokenizer, text))

    def _protected(self, role: str, text: str) -> str:
        """Escape an observation's text, so none of it becomes a control token that could open a turn."""
        known = control_tokens(self._tokenizer)
        return str(protect(text, known.tool if role == "tool" else known.other))

    def _rendered_after(self, role: str, text: str) -> str:
        """Return the text the template renders after the policy's message."""
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _MARK},
            {"role": role, "content": text},
        ]
        try:
            rendered = str(
                self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:  # template errors surface through jinja2 as many types
            raise UserError(
                f"data.format.chat_template: the model's template cannot continue after a turn with a message"
                f" of role {role!r}: {error}"
            ) from error
        _, mark, after = rendered.rpartition(_MARK)
        if not mark or text.strip() not in after:
            raise UserError(
                f"data.format.chat_template: the model's template does not show a message of role {role!r}"
                " after the assistant's"
            )
        return after
