"""Names and call ids of messages that a chat template would leave out without a word.

A tool message says by ``tool_call_id`` which call it answers, and may repeat that call's ``name``. Most
templates show neither, and lose nothing where results stand in the order of their calls. Other names, of
users or of tools, would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_names(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse messages of which the template would leave a name out that the rest does not say.

    Raises:
        ValueError: names the field and the message.
    """
    open_calls: list[Mapping[str, Any]] = []
    for position, message in enumerate(messages):
        role = str(message.get("role"))
        if calls := message.get("tool_calls"):
            open_calls = list(calls)
        known = open_calls.pop(0) if role == "tool" and open_calls else {}
        expected = {"tool_call_id": known.get("id"), "name": known.get("function", known).get("name")}
        for key, value in expected.items():
            given = message.get(key)
            if given is None or (role == "tool" and given == value):
                continue
            if not _shows(tokenizer, str(tokenizer.chat_template), role, key):
                why = " of another call than the one it follows" if key == "tool_call_id" and known else ""
                raise ValueError(
                    f"the chat template has no place for {key} in a message of role {role!r}, and message "
                    f"{position} has one{why} ({given!r})"
                )


@lru_cache(maxsize=64)
def _shows(tokenizer: PreTrainedTokenizerBase, template: str, role: str, key: str) -> bool:
    """Whether what the template writes depends on this field of such a message."""
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": {}}}
    before: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    if role == "tool":
        before.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif role == "assistant":
        pass
    else:
        before = []

    def written(value: str) -> str:
        message = {"role": role, "content": "y", key: value}
        if role == "tool":
            message = {"tool_call_id": "call00001", "name": "probe"} | message
        return str(tokenizer.apply_chat_template([*before, message], tokenize=False))

    try:
        return written("call00002") != written("call00003")
    except Exception:  # the template will say so itself
        return True
