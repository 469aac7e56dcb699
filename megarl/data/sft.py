"""Demonstrations as training sequences: which tokens are there, and which are learned from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, Any

from megarl.config.schema import PromptFormat, SftDataConfig, SftJsonlSource, SftReasoningGymSource
from megarl.data.jsonl import get_messages, get_text, read_jsonl
from megarl.data.prompts import Split
from megarl.data.transcript import Transcripts
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
        self._transcripts = Transcripts(tokenizer, prompt_format, max_sequence_length, "demonstration")
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
        return self._transcripts.pair(where, entry["question"], response)


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
            return self._transcripts.conversation(where, get_messages(record, "messages", where))
        if "prompt" not in record and "response" not in record:
            raise UserError(f'{where}: needs "messages", or "prompt" and "response"')
        return self._transcripts.pair(
            where, get_text(record, "prompt", where), get_text(record, "response", where)
        )


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
            only append (:class:`megarl.data.transcript.Transcripts`).
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
