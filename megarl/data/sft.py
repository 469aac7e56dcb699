"""Demonstrations as training sequences: which tokens are there, and which are learned from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, Any

from megarl.config.schema import PromptFormat, SftDataConfig, SftJsonlSource, SftReasoningGymSource
from megarl.data.jsonl import get_messages, get_text, read_jsonl
from megarl.data.prompts import Split
from megarl.data.tokenizer import Message, chat_ids
from megarl.environments.tasks import check_disjoint, make_dataset
from megarl.errors import UserError
from megarl.records import Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As for prompts: generated demonstrations are checked this far at load, the rest when drawn.
_NUM_CHECKED_AT_LOAD = 256


class Demonstrations(ABC, AbstractSequence[Sequence]):
    """Training sequences by index; the same index is the same sequence, always."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        max_sequence_length: int,
        field: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._max_sequence_length = max_sequence_length
        self._field = field

    @abstractmethod
    def _sequence(self, index: int) -> Sequence:
        """The demonstration at ``index`` in [0, len)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"demonstration {index} of {len(self)}")
        return self._sequence(index % len(self))

    def _from_pair(self, where: str, prompt: str, response: str) -> Sequence:
        """Prompt and response; ``where`` begins the message of any UserError."""
        if self._format.chat_template:
            user = {"role": "user", "content": prompt}
            return self._from_messages(where, [user, {"role": "assistant", "content": response}])
        prompt_ids = list(self._tokenizer(prompt + self._format.prompt_suffix)["input_ids"])
        response_ids = list(self._tokenizer(response, add_special_tokens=False)["input_ids"])
        response_ids.append(self._eos())
        return self._checked(
            where, prompt_ids + response_ids, [0] * len(prompt_ids) + [1] * len(response_ids)
        )

    def _from_messages(self, where: str, messages: AbstractSequence[Message]) -> Sequence:
        """A conversation in which every assistant turn is learned, its EOS included.

        The tokens of a turn are what the template adds to the tokens before it. The suffix belongs
        to the user's turns, as in the prompts of a rollout.
        """
        if not self._format.chat_template:
            raise UserError(f'{where}: "messages" need data.format.chat_template: true')
        turns = self._with_format(where, messages)
        try:
            token_ids, loss_mask = self._mask_turns(turns)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        return self._checked(where, token_ids, loss_mask)

    def _with_format(self, where: str, messages: AbstractSequence[Message]) -> list[Message]:
        suffix = self._format.prompt_suffix
        turns: list[Message] = [
            {**m, "content": m["content"] + suffix} if m["role"] == "user" else m for m in messages
        ]
        if self._format.system_prompt is not None:
            if turns[0]["role"] == "system":
                raise UserError(f"{where}: has a system message, and data.format.system_prompt is set too")
            turns.insert(0, {"role": "system", "content": self._format.system_prompt})
        if turns[-1]["role"] != "assistant":
            raise UserError(f"{where}: the last message must be the assistant's, for it is what is learned")
        return turns

    def _mask_turns(self, turns: list[Message]) -> tuple[list[int], list[int]]:
        eos = self._eos()
        token_ids = chat_ids(self._tokenizer, turns, add_generation_prompt=False)
        loss_mask = [0] * len(token_ids)
        for position, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = chat_ids(self._tokenizer, turns[:position], add_generation_prompt=True)
            after = chat_ids(self._tokenizer, turns[: position + 1], add_generation_prompt=False)
            if after[: len(before)] != before or token_ids[: len(after)] != after:
                raise ValueError(
                    f"the chat template writes message {position} differently when others follow, so its "
                    "tokens cannot be told apart; use a template that only appends"
                )
            end = len(after)
            # Templates put a line break after EOS; it is never sampled, so it is not learned.
            last_eos = max((i for i in range(len(before), end) if after[i] == eos), default=None)
            if last_eos is not None:
                end = last_eos + 1
            loss_mask[len(before) : end] = [1] * (end - len(before))
        end = len(loss_mask) - loss_mask[::-1].index(1)
        token_ids, loss_mask = token_ids[:end], loss_mask[:end]
        if token_ids[-1] != eos:  # the template ends turns with another token than the tokenizer's EOS
            token_ids.append(eos)
            loss_mask.append(1)
        return token_ids, loss_mask

    def _eos(self) -> int:
        eos = self._tokenizer.eos_token_id
        assert isinstance(eos, int), "check_tokenizer() refuses a tokenizer without EOS"
        return eos

    def _checked(self, where: str, token_ids: list[int], loss_mask: list[int]) -> Sequence:
        if len(token_ids) > self._max_sequence_length:
            raise UserError(
                f"{where}: the demonstration has {len(token_ids)} tokens, but at most "
                f"{self._max_sequence_length} are allowed (packing.max_sequence_length)"
            )
        return Sequence(token_ids=token_ids, loss_mask=loss_mask)


class _ReasoningGymDemonstrations(Demonstrations):
    def __init__(self, source: SftReasoningGymSource, *args: Any) -> None:
        super().__init__(*args)
        self._templates = source.response_templates
        if not self._templates or not all("{answer}" in template for template in self._templates):
            raise UserError(f"{self._field}.response_templates: needs forms that each contain {{answer}}")
        self._dataset = make_dataset(source, self._field)
        for index in range(min(len(self), _NUM_CHECKED_AT_LOAD)):
            self._sequence(index)

    def __len__(self) -> int:
        return len(self._dataset)

    def _sequence(self, index: int) -> Sequence:
        entry = self._dataset[index]
        where = f"{self._field}: problem {index}"
        if entry["answer"] is None:
            raise UserError(f"{where}: the task gives no reference answer to learn from")
        response = self._templates[index % len(self._templates)].replace("{answer}", str(entry["answer"]))
        return self._from_pair(where, entry["question"], response)


class _JsonlDemonstrations(Demonstrations):
    def __init__(self, source: SftJsonlSource, *args: Any) -> None:
        super().__init__(*args)
        self._sequences = [
            self._from_record(f"{source.path}:{number}", record)
            for number, record in read_jsonl(source.path, f"{self._field}.path")
        ]

    def __len__(self) -> int:
        return len(self._sequences)

    def _sequence(self, index: int) -> Sequence:
        return self._sequences[index]

    def _from_record(self, where: str, record: dict[str, Any]) -> Sequence:
        if "messages" in record:
            if "prompt" in record or "response" in record:
                raise UserError(f'{where}: has both "messages" and "prompt"/"response"; keep one of them')
            return self._from_messages(where, get_messages(record, "messages", where))
        if "prompt" not in record and "response" not in record:
            raise UserError(f'{where}: needs "messages", or "prompt" and "response"')
        return self._from_pair(where, get_text(record, "prompt", where), get_text(record, "response", where))


def load_demonstrations(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_sequence_length: int,
    split: Split,
) -> Demonstrations:
    """The demonstrations of one split, each at most ``max_sequence_length`` tokens long.

    Prompt tokens carry loss mask 0, response tokens and their EOS 1; in a conversation every
    assistant turn counts as a response.

    Raises:
        UserError: as :func:`megarl.data.prompts.load_prompts`, and a chat template that does not
            only append (:meth:`Demonstrations._from_messages`).
    """
    train, held_out = config.train, config.held_out
    if isinstance(train, SftReasoningGymSource) and isinstance(held_out, SftReasoningGymSource):
        check_disjoint(train, held_out)
    if (
        isinstance(train, SftJsonlSource)
        and isinstance(held_out, SftJsonlSource)
        and train.path == held_out.path
    ):
        raise UserError(f"data.held_out.path: {held_out.path} is also data.train.path")
    source = train if split == "train" else held_out
    if source is None:
        raise UserError("data.held_out: missing; the validation loss needs held-out demonstrations")
    arguments = (tokenizer, config.format, max_sequence_length, f"data.{split}")
    if isinstance(source, SftReasoningGymSource):
        return _ReasoningGymDemonstrations(source, *arguments)
    return _JsonlDemonstrations(source, *arguments)
