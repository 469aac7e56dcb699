"""Text of users, tools and data that looks like the chat's markup stays text.

A chat template puts a message's text between control tokens, and a tokenizer makes such a token of every
place that spells one. Text that somebody else wrote could so end its message and open another: a tool's
output could speak as the user. :func:`protect` marks these places before the template is applied, and
:func:`tokenize` splits there: what the template wrote becomes control tokens, what a message says plain ones.

Protected are the tokenizer's special tokens, and whatever added tokens the template writes around messages of
that role (``<tool_response>``, ``<|User|>``, which need not be special). What an assistant writes by itself
(``<think>``, ``<tool_call>``) stays as it is; what opens or ends turns in its text is refused: learned as
text, it would teach the model to spell it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "\u2063\ue0c1\u2063"
"""Where text is split before it is tokenised. Occurs in no template; text that has it loses it."""
_MARKS = "\u2063one\u2063", "\u2063two\u2063", "\u2063three\u2063"
_NOT_TEXT = ("role", "type")  # what templates compare with words of their own


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Patterns of control tokens that texts must not spell; None: no restriction."""

    turns: re.Pattern[str] | None
    """Tokens that open and end turns, for an assistant's text."""
    tool: re.Pattern[str] | None
    """For a tool's output."""
    other: re.Pattern[str] | None
    """For everybody else's."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The control tokens of a tokenizer and its template."""
    return _control_tokens(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokens:
    added = {str(each): bool(each.special) for each in tokenizer.added_tokens_decoder.values()}
    special = {text for text, is_special in added.items() if is_special}
    around = {role: _written_around(tokenizer, role, set(added)) for role in ("user", "tool")}
    turns = around["user"]
    return ControlTokens(
        _pattern(turns), _pattern(special | turns | around["tool"]), _pattern(special | turns)
    )


def protect(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """``value`` with SPLIT inside every place of its texts, at any depth, that spells a control token."""
    if pattern is None:
        return value
    if isinstance(value, str):
        return pattern.sub(lambda found: found[0][:1] + SPLIT + found[0][1:], value.replace(SPLIT, ""))
    if isinstance(value, Mapping):
        return {key: each if key in _NOT_TEXT else protect(each, pattern) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [protect(each, pattern) for each in value]
    return value


def protect_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages whose texts cannot become control tokens.

    Raises:
        ValueError: an assistant's text spells a token that opens or ends a turn.
    """
    known, found = control_tokens(tokenizer), []
    for message in messages:
        if message.get("role") != "assistant":
            pattern = known.tool if message.get("role") == "tool" else known.other
            found.append(protect(message, pattern))
            continue
        if known.turns is not None and (spelt := known.turns.search(_text_of(message))):
            raise ValueError(f"the assistant's text spells {spelt[0]!r}, which opens or ends a turn")
        found.append(message)
    return found


def _text_of(value: Any) -> str:
    """All texts of a message, at any depth."""
    if isinstance(value, Mapping):
        return "\n".join(_text_of(each) for key, each in value.items() if key not in _NOT_TEXT)
    if isinstance(value, list | tuple):
        return "\n".join(map(_text_of, value))
    return value if isinstance(value, str) else ""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that may have been protected; nothing is put before or after it."""
    parts = [part for part in text.split(SPLIT) if part]
    return [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]


def _pattern(tokens: set[str]) -> re.Pattern[str] | None:
    longer = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longer))) if longer else None


def _written_around(tokenizer: PreTrainedTokenizerBase, role: str, added: set[str]) -> set[str]:
    """The added tokens that the template writes after an assistant's text, up to the end of a message of
    ``role`` that follows; none where it refuses such a chat."""
    if tokenizer.chat_template is None:
        return set()
    first, second, third = _MARKS
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": second},
        {"role": role, "content": third},
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except Exception:  # templates raise through jinja2, in many ways
        return set()
    markup = text.partition(second)[2]
    return {token for token in added if token in markup}
