"""Demonstrations as training sequences with loss masks."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megarl.config.data import (
    PlainSftSource,
    SftColumns,
    SftDataConfig,
    SftHfSource,
    SftJsonlSource,
    SftMixtureSource,
    SftReasoningGymSource,
)
from megarl.data.load import Converted, collect, load_tokens, locate, reads_everything
from megarl.data.prompts import NUM_CHECKED_AT_LOAD, Split
from megarl.data.report import LoadReport
from megarl.data.row_fields import as_messages, get_field, get_messages, get_text, get_text_or_messages
from megarl.data.row_formats import alpaca_messages, instruction, recognise, sharegpt_messages
from megarl.data.rows import Row, read_json, read_rows
from megarl.data.store import TokenStore
from megarl.data.stream import ExampleStream, Streamed
from megarl.data.transcript import Transcripts
from megarl.environments.tasks import make_dataset
from megarl.errors import UserError
from megarl.records import TokenSequence, TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SftDataset(ABC, Sequence[TokenSequence]):
    """Training sequences by index, deterministic.

    ``reports`` has a LoadReport per source; ``parts`` and ``stream`` are as in megarl.data.order.
    """

    is_mixture = False
    stream: ExampleStream[SftDataset] | None = None

    def __init__(self, reports: list[LoadReport]) -> None:
        self.reports = reports
        self.parts: list[tuple[int, float]] = []

    @abstractmethod
    def _sequence(self, index: int) -> TokenSequence:
        """Return the demonstration at ``index`` in [0, len)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"demonstration {index} of {len(self)}")
        return self._sequence(index % len(self))

    def batch(self, indices: Sequence[int]) -> TrainBatch:
        """Return these demonstrations as a batch, in this order."""
        return TrainBatch.of(self._sequence(index) for index in indices)


class _ReasoningGymDemonstrations(SftDataset):
    def __init__(self, source: SftReasoningGymSource, transcripts: Transcripts, field: str) -> None:
        super().__init__([])
        self._field, self._transcripts = field, transcripts
        self._templates = source.response_templates
        if not self._templates or not all("{answer}" in template for template in self._templates):
            raise UserError(f"{self._field}.response_templates: each template must contain {{answer}}")
        self._dataset = make_dataset(source, self._field)

    def check(self) -> None:
        """Generate the first demonstrations, to find errors at load."""
        for index in range(min(len(self), NUM_CHECKED_AT_LOAD)):
            self._sequence(index)

    def __len__(self) -> int:
        return len(self._dataset)

    def _sequence(self, index: int) -> TokenSequence:
        entry = self._dataset[index]
        where = f"{self._field}: problem {index}"
        if entry["answer"] is None:
            raise UserError(f"{where}: the task gives no reference answer to learn from")
        response = self._templates[index % len(self._templates)].replace("{answer}", str(entry["answer"]))
        return self._transcripts.pair(where, entry["question"], response)


class _StoredDemonstrations(SftDataset):
    def __init__(self, store: TokenStore, report: LoadReport) -> None:
        super().__init__([report])
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def _sequence(self, index: int) -> TokenSequence:
        sequence: TokenSequence = self._store[index]
        return sequence


class _StreamedDemonstrations(Streamed, SftDataset):
    def __init__(self, stream: ExampleStream[SftDataset]) -> None:
        super().__init__([])
        self.stream = stream
        stream.tell = self.reports.append

    def _sequence(self, index: int) -> TokenSequence:
        sequence: TokenSequence = self.stream[index]
        return sequence


class _MixedDemonstrations(SftDataset):
    """Concatenated datasets."""

    is_mixture = True

    def __init__(self, sets: list[SftDataset], weights: list[float] | None) -> None:
        super().__init__([report for each in sets for report in each.reports])
        self._sets, self._sizes = sets, [len(each) for each in sets]
        if weights is not None:
            self.parts = list(zip(self._sizes, weights, strict=True))

    def __len__(self) -> int:
        return sum(self._sizes)

    def _sequence(self, index: int) -> TokenSequence:
        part, row = locate(index, self._sizes)
        return self._sets[part]._sequence(row)


class _RowForms:
    """Converts rows: selects columns and the format (:mod:`megarl.data.row_formats`)."""

    def __init__(self, columns: SftColumns, transcripts: Transcripts, report: LoadReport) -> None:
        self._columns, self._transcripts, self._report = columns, transcripts, report
        self._names = {
            kind: getattr(columns, f"{kind}_field") or kind
            for kind in ("messages", "prompt", "response", "text", "tools")
        }

    def __call__(self, where: str, record: dict[str, Any]) -> Converted[TokenSequence]:
        form = self._form(where, record)
        if form == "text":
            chunks = self._transcripts.text(where, get_text(record, self._names["text"], where))
            length = sum(len(chunk.token_ids) - 1 for chunk in chunks) + 1
            if len(chunks) > 1:
                self._report.chunked.add(f"{where}: {length} tokens, {len(chunks)} chunks")
            return Converted(chunks, length, length)
        if record.get("chat_template_kwargs"):
            raise UserError(f"{where}: chat_template_kwargs are set for all rows, by data.format")
        tools = self._tools(where, record)
        found = self._turns(form, where, record)
        if isinstance(found[0], str):
            if tools is not None:
                raise UserError(f"{where}: tools need a conversation, in a column of messages")
            sequence = self._transcripts.pair(where, *found)
        else:
            messages, first_learned = found
            sequence = self._transcripts.conversation(where, messages, first_learned, tools=tools)
        length = len(sequence)
        return Converted([sequence], length, length)

    def _turns(
        self, form: str, where: str, record: dict[str, Any]
    ) -> tuple[str, str] | tuple[list[dict[str, Any]], int]:
        """Return prompt and response, or a conversation and the first message that is learned."""
        names = self._names
        if form == "messages":
            name = names["messages"]
            return get_messages(self._parsed(record, name, where), name, where, weighted=True), 0
        if form == "sharegpt":
            name = self._columns.messages_field or "conversations"
            return sharegpt_messages(self._parsed(record, name, where), name, where, weighted=True), 0
        if form == "alpaca":
            if (messages := alpaca_messages(record, where)) is not None:
                return messages, 0
            return instruction(record, where), get_text(record, "output", where)
        response = names["response"] if self._columns.response_field else form.removeprefix("prompt_")
        given, answer = (
            get_text_or_messages(record, name, where, weighted=True) for name in (names["prompt"], response)
        )
        if isinstance(given, str) and isinstance(answer, str):
            return given, answer
        prompt = as_messages(given, "user")
        return [*prompt, *as_messages(answer, "assistant")], len(prompt)

    def _form(self, where: str, record: dict[str, Any]) -> str:
        columns = self._columns
        if columns.row_format != "auto":
            names = {"messages": columns.messages_field, "sharegpt": columns.messages_field}
            if columns.row_format == "text" or names.get(columns.row_format) or columns.names_pair:
                return columns.row_format
        elif columns.messages_field:
            return "messages"
        elif columns.names_pair:
            return "prompt_response"
        elif columns.text_field:
            return "text"
        return recognise(record, where, columns.usable, columns.row_format)

    def _tools(self, where: str, record: dict[str, Any]) -> list[Any] | None:
        name = self._names["tools"]
        if name not in record and self._columns.tools_field is None:
            return None
        get_field(record, name, where)
        tools = self._parsed(record, name, where)[name]
        if not isinstance(tools, list):
            raise UserError(f"{where}: field {name!r} must be a list of tools, found {type(tools).__name__}")
        return tools or None

    def _parsed(self, record: dict[str, Any], name: str, where: str) -> dict[str, Any]:
        """Return the record with one column parsed from JSON text, as columnar files store nested lists."""
        value = record.get(name)
        if not isinstance(value, str):
            return record
        try:
            return record | {name: read_json(value)}
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: field {name!r} holds text that is not JSON: {error.msg}") from error
        except ValueError as error:
            raise UserError(f"{where}: field {name!r}: {error}") from error


def load_demonstrations(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_sequence_length: int,
    split: Split,
) -> SftDataset:
    """Load the demonstrations of one split, each at most ``max_sequence_length`` tokens long.

    The loss mask is 0 for prompt tokens and 1 for response tokens and their EOS. In a conversation every
    assistant turn is a response; in raw text every token has mask 1.

    Raises:
        UserError: as :func:`megarl.data.prompts.load_prompts`, and a chat template that is not prefix-stable
            (:class:`megarl.data.transcript.Transcripts`).
    """
    train, held_out = config.train, config.held_out
    source = train if split == "train" else held_out
    if source is None:
        raise UserError("data.held_out: missing; the validation loss needs held-out demonstrations")
    last_only = config.learned_turns == "last"
    transcripts = Transcripts(
        tokenizer, config.format, max_sequence_length, "demonstration", last_turn_only=last_only
    )
    loader = _Loader(config, tokenizer, transcripts, max_sequence_length)
    if not isinstance(source, SftMixtureSource):
        return loader.load(source, f"data.{split}")
    sets = [loader.load(part, f"data.{split}.sources.{name}") for name, part in source.sources.items()]
    weights = None if source.weights is None else [source.weights[name] for name in source.sources]
    return _MixedDemonstrations(sets, weights)


class _Loader:
    def __init__(
        self,
        config: SftDataConfig,
        tokenizer: PreTrainedTokenizerBase,
        transcripts: Transcripts,
        max_sequence_length: int,
    ) -> None:
        self._config, self._tokenizer, self._transcripts = config, tokenizer, transcripts
        self._kind = {
            "kind": "sft",
            "max_sequence_length": max_sequence_length,
            "learned_turns": config.learned_turns,
        }

    def load(self, source: PlainSftSource, field: str) -> SftDataset:
        """Load one plain source."""
        if isinstance(source, SftJsonlSource | SftHfSource) and source.streaming:
            return _StreamedDemonstrations(
                ExampleStream(source, field, functools.partial(self._window, source))
            )
        generated = None
        if isinstance(source, SftReasoningGymSource):
            generated = _ReasoningGymDemonstrations(source, self._transcripts, field)
            if not reads_everything(self._config):
                generated.check()
                return generated

        def sequences(report: LoadReport) -> Iterator[TokenSequence]:
            if generated is not None:
                made = generated
                rows = ((f"{field}: problem {i}", {"index": i}) for i in range(len(made)))

                def convert(_where: str, record: dict[str, Any]) -> Converted[TokenSequence]:
                    sequence = made._sequence(record["index"])
                    return Converted([sequence], len(sequence), len(sequence))

                return collect(rows, convert, self._config, report)
            assert not isinstance(source, SftReasoningGymSource)
            forms = _RowForms(source, self._transcripts, report)
            return collect(read_rows(source, field), forms, self._config, report)

        store, report = load_tokens(source, self._config, self._tokenizer, self._kind, field, sequences)
        return _StoredDemonstrations(store, report)

    def _window(
        self, source: SftJsonlSource | SftHfSource, rows: Iterable[Row], report: LoadReport, _before: int
    ) -> SftDataset:
        forms = _RowForms(source, self._transcripts, report)
        store = TokenStore.of(collect(rows, forms, self._config, report, whole=False))
        return _StoredDemonstrations(store, report)
