"""Tokenise prompt/response pairs, conversations and raw text into training sequences with loss masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.config.data import PromptFormat
from megarl.data.control_tokens import tokenize
from megarl.data.report import TooLongError
from megarl.data.tokenizer import Message, chat_text
from megarl.errors import UserError
from megarl.records import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BEGIN, _END = "<think>", "</think>"
# A template may put this much after the last turn's EOS (a line break, as a rule); it is cut off.
_MAX_AFTER_EOS = 64


class Transcripts:
    """Tokenises with one format; ``where`` is the prefix of UserErrors."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        max_sequence_length: int,
        noun: str,
        *,
        last_turn_only: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._max_sequence_length = max_sequence_length
        self._noun = noun  # name of a sequence in errors
        self._last_only = last_turn_only

    @property
    def applies_template(self) -> bool:
        """Whether prompts and responses go through the chat template."""
        return bool(self._format.chat_template)

    def pair(self, where: str, prompt: str, response: str) -> TokenSequence:
        """Tokenise prompt and response; the loss mask covers the response and its EOS."""
        if self._format.chat_template:
            user = {"role": "user", "content": prompt}
            return self.conversation(where, [user, {"role": "assistant", "content": response}])
        prompt_ids = list(self._tokenizer(prompt + self._format.prompt_suffix)["input_ids"])
        response_ids = list(self._tokenizer(response, add_special_tokens=False)["input_ids"])
        response_ids.append(self._eos())
        return self._checked(
            where, prompt_ids + response_ids, [0] * len(prompt_ids) + [1] * len(response_ids)
        )

    def conversation(
        self,
        where: str,
        messages: Sequence[Message],
        first_learned: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> TokenSequence:
        """Tokenise a conversation; the loss mask covers assistant turns from ``messages[first_learned]`` on.

        The tokens of a turn are those that the template appends for it, EOS included. The prompt suffix is
        appended to user turns, as in rollouts. ``tools`` are passed to the template. A message of weight 0 is
        context, not a target.

        Raises:
            UserError: no turn is a target; the template is not prefix-stable or drops tools; the sequence is
                too long.
        """
        if not self._format.chat_template:
            raise UserError(f"{where}: chat messages need data.format.chat_template: true")
        turns = self._with_format(where, messages)
        first = len(turns) - 1 if self._last_only else first_learned + len(turns) - len(messages)
        learned = [n for n in range(first, len(turns)) if _is_target(turns[n])]
        if not learned:
            raise UserError(f"{where}: nothing to learn: the weight of the assistant's messages is 0")
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        try:
            token_ids, loss_mask = self._mask_turns(where, turns, learned, tools)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        return self._checked(where, token_ids, loss_mask)

    def text(self, where: str, text: str) -> list[TokenSequence]:
        """Tokenise raw text with EOS, in chunks of at most ``max_sequence_length`` tokens, all in the loss.

        A chunk begins with the last token of the one before, so that each token except the first of the text
        is predicted exactly once. Neither template nor prompt format is applied.
        """
        if self._format.prompt_suffix or self._format.system_prompt is not None:
            name = "prompt_suffix" if self._format.prompt_suffix else "system_prompt"
            raise UserError(f"{where}: data.format.{name} does not apply to raw text")
        ids = [*self._tokenizer(text)["input_ids"]]
        if not ids or ids[-1] != self._eos():
            ids.append(self._eos())
        if len(ids) < 2:
            raise UserError(f"{where}: the text has no tokens")
        size = self._max_sequence_length
        chunks = [ids[start : start + size] for start in range(0, len(ids) - 1, size - 1)]
        return [_sequence(chunk, [0] + [1] * (len(chunk) - 1)) for chunk in chunks]

    def _with_format(self, where: str, messages: Sequence[Message]) -> list[Message]:
        suffix = self._format.prompt_suffix
        turns: list[Message] = [
            {**m, "content": m["content"] + suffix} if m["role"] == "user" else m for m in messages
        ]
        if self._format.system_prompt is not None:
            if turns[0]["role"] == "system":
                raise UserError(f"{where}: has a system message, and data.format.system_prompt is set too")
            turns.insert(0, {"role": "system", "content": self._format.system_prompt})
        if turns[-1]["role"] != "assistant":
            raise UserError(f"{where}: the last message must have role 'assistant'")
        return turns

    def _mask_turns(
        self, where: str, turns: list[Message], learned: Sequence[int], tools: Sequence[Any] | None
    ) -> tuple[list[int], list[int]]:
        eos = self._eos()
        whole = self._render(turns, tools, prompt=False)
        # Before the template is applied up to every turn: that takes the square of their number.
        self._check_length(where, len(tokenize(self._tokenizer, whole)), spare=_MAX_AFTER_EOS)
        cut, token_ids, loss_mask = 0, list[int](), list[int]()
        for position in learned:
            turn, last = turns[position], position == len(turns) - 1
            before = self._render(turns[:position], tools, prompt=True)
            after = whole if last else self._render(turns[: position + 1], tools, prompt=False)
            if last and (written := self._reasoned(turn, before, after)) is not None:
                whole = after = before + written
            if not whole.startswith(after):
                raise ValueError(
                    f"the chat template renders message {position} differently when others follow; use a "
                    "template that only appends (data.format.chat_template: qwen3, ...), or learn the "
                    "last turn only (data.learned_turns)"
                )
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template writes {before[_common(before, after) :]!r} where message {position} "
                    "is to be generated, and not where it is shown: begin the message with it, or set "
                    "data.format.chat_template_kwargs"
                )
            prompt_ids, turn_ids = self._split(token_ids, cut, len(before), after)
            cut = len(after)
            # Templates append a line break after EOS; it is never sampled, so it has no loss.
            end = max((i + 1 for i, token in enumerate(turn_ids) if token == eos), default=len(turn_ids))
            token_ids += prompt_ids + turn_ids
            loss_mask += [0] * len(prompt_ids) + [1] * end + [0] * (len(turn_ids) - end)
        end = len(loss_mask) - loss_mask[::-1].index(1)
        token_ids, loss_mask = token_ids[:end], loss_mask[:end]
        if token_ids[-1] != eos:  # the template ends turns with a token other than the tokenizer's EOS
            token_ids.append(eos)
            loss_mask.append(1)
        return token_ids, loss_mask

    def _split(self, done: list[int], cut: int, start: int, after: str) -> tuple[list[int], list[int]]:
        """Return the tokens of ``after`` from ``cut`` (before it: ``done``) to ``start``, and from there on.

        If a token would span both, an answer that begins with a line break say, each is tokenised alone, as
        when the answer is sampled.
        """
        prompt, whole = (tokenize(self._tokenizer, text) for text in (after[:start], after))
        if whole[: len(prompt)] == prompt and prompt[: len(done)] == done:
            return prompt[len(done) :], whole[len(prompt) :]
        return tokenize(self._tokenizer, after[cut:start]), tokenize(self._tokenizer, after[start:])

    def _render(self, turns: list[Message], tools: Sequence[Any] | None, *, prompt: bool) -> str:
        return chat_text(self._tokenizer, turns, add_generation_prompt=prompt, tools=tools)

    def _reasoned(self, turn: Message, before: str, after: str) -> str | None:
        """Return what the policy would have written, if the template leaves the reasoning out; else None.

        Templates that open <think> in the prompt show a message without what stands before </think>.
        """
        content = turn["content"]
        shown = after[_common(before, after) :]
        if not isinstance(content, str) or _END not in content or _END in shown:
            return None
        reasoning, answer = content.rsplit(_END, 1)
        place = shown.rfind(answer.strip())
        if place < 0 or not before.rstrip().endswith(_BEGIN):
            raise ValueError(f"the chat template leaves out what stands before {_END}")
        ending = shown[place + len(answer.strip()) :]
        return f"{reasoning.lstrip().removeprefix(_BEGIN).lstrip()}{_END}{answer}{ending}"

    def _eos(self) -> int:
        eos = self._tokenizer.eos_token_id
        assert isinstance(eos, int), "check_tokenizer() rejects a tokenizer without EOS"
        return eos

    def _checked(self, where: str, token_ids: list[int], loss_mask: list[int]) -> TokenSequence:
        self._check_length(where, len(token_ids))
        return _sequence(token_ids, loss_mask)

    def _check_length(self, where: str, length: int, spare: int = 0) -> None:
        if length - spare > self._max_sequence_length:
            raise TooLongError(
                f"{where}: the {self._noun} has {length} tokens, but at most "
                f"{self._max_sequence_length} are allowed (packing.max_sequence_length)"
            )


def _is_target(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _common(first: str, second: str) -> int:
    """Return how many characters two texts begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _sequence(token_ids: list[int], loss_mask: list[int]) -> TokenSequence:
    return TokenSequence(np.array(token_ids, dtype=np.int32), np.array(loss_mask, dtype=np.uint8))
