"""Preference pairs: two tokenised responses to one prompt, from rows or made from reasoning-gym problems.

A row is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}   each a string or a list of chat messages
    {"chosen": [...], "rejected": [...]}              conversations that begin with the same messages
    {"chosen": "...", "rejected": "..."}              texts that begin alike (without a chat template)
    {"prompt": ..., "completion": ..., "label": true} unpaired; joined to pairs by their prompt

The common beginning of two conversations is the prompt, the rest are the responses. A "prompt" in the same
row may repeat that beginning. Other fields are ignored.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.config.preference import (
    PlainPreferenceSource,
    PreferenceColumns,
    PreferenceDataConfig,
    PreferenceHfSource,
    PreferenceJsonlSource,
    PreferenceMixtureSource,
    PreferenceReasoningGymSource,
)
from megarl.data.load import Converted, collect, load_tokens, locate, reads_everything
from megarl.data.prompts import NUM_CHECKED_AT_LOAD, Split
from megarl.data.report import LoadReport
from megarl.data.row_fields import as_messages, get_text_or_messages
from megarl.data.row_formats import pair_up, preference_record, recognise, refuse_unpaired, split_texts
from megarl.data.rows import Row, read_rows
from megarl.data.store import TokenStore
from megarl.data.stream import ExampleStream, Streamed
from megarl.data.transcript import Transcripts
from megarl.environments.tasks import make_dataset
from megarl.errors import UserError
from megarl.records import Pair, TokenSequence, TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


class Pairs(ABC, Sequence[Pair]):
    """Pairs by index, deterministic.

    ``reports`` has a LoadReport per source; ``parts`` and ``stream`` are as in megarl.data.order.
    """

    is_mixture = False
    stream: ExampleStream[Pairs] | None = None

    def __init__(self, max_sequence_length: int, field: str) -> None:
        self._max_sequence_length = max_sequence_length
        self._field = field
        self.reports: list[LoadReport] = []
        self.parts: list[tuple[int, float]] = []

    @abstractmethod
    def _pair(self, index: int) -> Pair:
        """Return the pair at ``index`` in [0, len)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._pair(index % len(self))

    def batch(self, indices: Sequence[int]) -> TrainBatch:
        """Return a batch of 2 len(indices) sequences: chosen and rejected of each pair in turn."""
        pairs = [self._pair(index) for index in indices]
        return TrainBatch.of(sequence for pair in pairs for sequence in (pair.chosen, pair.rejected))

    def mismatched(self, index: int) -> tuple[TokenSequence, TokenSequence]:
        """Return the prompt of pair ``index`` with both responses of the next pair that has another prompt.

        These are the mismatched sequences of KTO's KL term. Pairs that would give too long a sequence are
        skipped.

        Raises:
            UserError: there is no such pair.
        """
        own = self._pair(index)
        prompt = own.chosen.token_ids[: own.num_prompt_tokens]
        for step in range(1, len(self)):
            other = self._pair((index + step) % len(self))
            start = other.num_prompt_tokens
            if np.array_equal(other.chosen.token_ids[:start], prompt):
                continue
            no_loss = np.zeros_like(prompt, dtype=np.uint8)
            both = [
                TokenSequence(
                    np.concatenate([prompt, s.token_ids[start:]]),
                    np.concatenate([no_loss, s.loss_mask[start:]]),
                )
                for s in (other.chosen, other.rejected)
            ]
            if max(map(len, both)) <= self._max_sequence_length:
                return both[0], both[1]
        raise UserError(
            f"{self._field}: algorithm.loss = kto needs responses to other prompts, but no pair with another "
            f"prompt than pair {index} has responses short enough for that prompt"
        )


def _joined(where: str, chosen: TokenSequence, rejected: TokenSequence) -> Pair:
    """Return the pair of two sequences with the same prompt and different responses, else raise UserError."""
    start = int(chosen.loss_mask.argmax())
    same = np.array_equal(chosen.token_ids[:start], rejected.token_ids[:start])
    if start != rejected.loss_mask.argmax() or not same:
        raise UserError(f"{where}: the chat template renders the prompt differently for the two responses")
    if np.array_equal(chosen.token_ids, rejected.token_ids):
        raise UserError(f"{where}: 'chosen' and 'rejected' have the same tokens")
    return Pair(chosen, rejected, start)


class _PairMaker:
    """Builds pairs from texts, messages and rows."""

    def __init__(self, transcripts: Transcripts) -> None:
        self._transcripts = transcripts

    def from_row(self, columns: PreferenceColumns, where: str, record: dict[str, Any]) -> Converted[Pair]:
        """Return the pair of one row."""
        if not columns.names_columns:
            recognise(record, where, columns.usable, "auto" if columns.row_format == "auto" else "preference")
            record = preference_record(record, where)
        names = {
            "prompt": columns.prompt_field or "prompt",
            "chosen": columns.chosen_field,
            "rejected": columns.rejected_field,
        }
        fields = {
            kind: get_text_or_messages(record, name, where)
            for kind, name in names.items()
            if name in record or kind != "prompt" or columns.prompt_field
        }
        return measured(self._from_fields(where, fields))

    def _from_fields(self, where: str, fields: dict[str, str | Messages]) -> Pair:
        chosen, rejected, prompt = fields["chosen"], fields["rejected"], fields.get("prompt")
        if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
            return self.from_texts(where, prompt, chosen, rejected)
        if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
            if self._transcripts.applies_template:
                raise UserError(
                    f"{where}: no field 'prompt'; texts that hold it in 'chosen' and 'rejected' need "
                    "data.format.chat_template: false"
                )
            return self.from_texts(where, *split_texts(where, chosen, rejected))
        if prompt is None or _begins_with_a_prompt(chosen, rejected):
            return self._from_messages(where, *_split(where, prompt, chosen, rejected))
        return self._from_messages(
            where,
            as_messages(prompt, "user"),
            as_messages(chosen, "assistant"),
            as_messages(rejected, "assistant"),
        )

    def from_texts(self, where: str, prompt: str, chosen: str, rejected: str) -> Pair:
        """Return the pair of three texts."""
        responses = [self._transcripts.pair(where, prompt, response) for response in (chosen, rejected)]
        return _joined(where, *responses)

    def _from_messages(self, where: str, prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if response[0]["role"] != "assistant":
                role = response[0]["role"]
                raise UserError(f"{where}: {name!r} must continue with an assistant message, found {role!r}")
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{where}: the prompt ends with an assistant message")
        responses = [
            self._transcripts.conversation(where, prompt + response, len(prompt))
            for response in (chosen, rejected)
        ]
        return _joined(where, *responses)


def measured(pair: Pair) -> Converted[Pair]:
    """Return the pair with the lengths that filters compare."""
    lengths = sorted((len(pair.chosen), len(pair.rejected)))
    return Converted([pair], *lengths)


class _StoredPairs(Pairs):
    def __init__(self, store: TokenStore, report: LoadReport, *args: Any) -> None:
        super().__init__(*args)
        self._store, self.reports = store, [report]

    def __len__(self) -> int:
        return len(self._store) // 2

    def _pair(self, index: int) -> Pair:
        chosen, rejected = self._store[2 * index], self._store[2 * index + 1]
        start = chosen.num_prompt_tokens
        return Pair(replace(chosen, num_prompt_tokens=0), rejected, start)


class _StreamedPairs(Streamed, Pairs):
    def __init__(self, stream: ExampleStream[Pairs], *args: Any) -> None:
        super().__init__(*args)
        self.stream = stream
        stream.tell = self.reports.append

    def _pair(self, index: int) -> Pair:
        pair: Pair = self.stream[index]
        return pair

    def mismatched(self, index: int) -> tuple[TokenSequence, TokenSequence]:
        """Return the prompt with both responses of the next pair of its window that has another prompt."""
        window = self.stream.window(index)
        return window.data.mismatched(index - window.start.first)


class _MixedPairs(Pairs):
    """Concatenated datasets."""

    is_mixture = True

    def __init__(self, sets: list[Pairs], weights: list[float] | None, *args: Any) -> None:
        super().__init__(*args)
        self._sets, self._sizes = sets, [len(each) for each in sets]
        self.reports = [report for each in sets for report in each.reports]
        if weights is not None:
            self.parts = list(zip(self._sizes, weights, strict=True))

    def __len__(self) -> int:
        return sum(self._sizes)

    def _pair(self, index: int) -> Pair:
        part, row = locate(index, self._sizes)
        return self._sets[part]._pair(row)


def _begins_with_a_prompt(chosen: str | Messages, rejected: str | Messages) -> bool:
    return (
        isinstance(chosen, list)
        and isinstance(rejected, list)
        and chosen[0]["role"] != "assistant"
        and rejected[0]["role"] != "assistant"
    )


def _split(
    where: str, prompt: str | Messages | None, chosen: str | Messages, rejected: str | Messages
) -> tuple[Messages, Messages, Messages]:
    """Return the common beginning of two conversations and both rests; ``prompt``, if any, must match."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: no field 'prompt'; without it both responses must be conversations")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) or common == len(rejected):
        raise UserError(f"{where}: 'chosen' and 'rejected' do not differ before one of them ends")
    if common == 0:
        raise UserError(f"{where}: 'chosen' and 'rejected' do not begin with the same message, the prompt")
    if prompt is not None:
        given = as_messages(prompt, "user")
        if given not in (chosen[:common], [m for m in chosen[:common] if m["role"] != "system"]):
            raise UserError(
                f"{where}: 'prompt' differs from the common beginning of 'chosen' and 'rejected'; remove it "
                "if they are whole conversations, or remove its messages from them"
            )
    return chosen[:common], chosen[common:], rejected[common:]


class _ReasoningGymPairs(Pairs):
    def __init__(self, source: PreferenceReasoningGymSource, maker: _PairMaker, *args: Any) -> None:
        super().__init__(*args)
        self._source, self._maker = source, maker
        self._dataset = make_dataset(source, self._field)

    def check(self) -> None:
        """Generate the first pairs, to find errors at load."""
        for index in range(min(len(self), NUM_CHECKED_AT_LOAD)):
            self._pair(index)

    def __len__(self) -> int:
        return len(self._dataset)

    def _pair(self, index: int) -> Pair:
        source, where = self._source, f"{self._field}: problem {index}"
        answer = self._answer(index)
        chosen = source.chosen_templates[index % len(source.chosen_templates)]
        rejected = source.rejected_templates[index % len(source.rejected_templates)]
        if "{other_answer}" in rejected:
            rejected = rejected.replace("{other_answer}", self._other_answer(index, answer))
        return self._maker.from_texts(
            where,
            self._dataset[index]["question"],
            chosen.replace("{answer}", answer),
            rejected.replace("{answer}", answer),
        )

    def _answer(self, index: int) -> str:
        answer = self._dataset[index]["answer"]
        if answer is None:
            raise UserError(f"{self._field}: problem {index}: the task gives no reference answer")
        return str(answer)

    def _other_answer(self, index: int, answer: str) -> str:
        for step in range(1, len(self)):
            if (other := self._answer((index + step) % len(self))) != answer:
                return other
        raise UserError(f"{self._field}: all problems have the answer {answer!r}, so none can be rejected")


def load_pairs(
    config: PreferenceDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_sequence_length: int,
    split: Split,
) -> Pairs:
    """Load the pairs of one split; prompt + response has at most ``max_sequence_length`` tokens.

    The loss mask is 0 for prompt tokens and 1 for tokens of assistant turns in the response.

    Raises:
        UserError: as :func:`megarl.data.sft.load_demonstrations`; responses that are equal or have different
            prompts.
    """
    train, held_out = config.train, config.held_out
    source, field = train if split == "train" else held_out, f"data.{split}"
    assert source is not None, f"data.{split} is not set"
    transcripts = Transcripts(tokenizer, config.format, max_sequence_length, "response with its prompt")
    loader = _Loader(config, tokenizer, transcripts, max_sequence_length)
    if not isinstance(source, PreferenceMixtureSource):
        return loader.load(source, field)
    sets = [loader.load(part, f"{field}.sources.{name}") for name, part in source.sources.items()]
    weights = None if source.weights is None else [source.weights[name] for name in source.sources]
    return _MixedPairs(sets, weights, max_sequence_length, field)


class _Loader:
    def __init__(
        self,
        config: PreferenceDataConfig,
        tokenizer: PreTrainedTokenizerBase,
        transcripts: Transcripts,
        max_sequence_length: int,
    ) -> None:
        self._config, self._tokenizer, self._longest = config, tokenizer, max_sequence_length
        self._maker = _PairMaker(transcripts)

    def load(self, source: PlainPreferenceSource, field: str) -> Pairs:
        """Load one plain source."""
        if isinstance(source, PreferenceJsonlSource | PreferenceHfSource) and source.streaming:
            window = functools.partial(self._window, source, field)
            return _StreamedPairs(ExampleStream(source, field, window), self._longest, field)
        generated = None
        if isinstance(source, PreferenceReasoningGymSource):
            generated = _ReasoningGymPairs(source, self._maker, self._longest, field)
            if not reads_everything(self._config):
                generated.check()
                return generated

        def pairs(report: LoadReport) -> Iterator[Pair]:
            if generated is not None:
                made = generated
                rows = ((f"{field}: problem {i}", {"index": i}) for i in range(len(made)))
                return collect(rows, lambda _, row: measured(made._pair(row["index"])), self._config, report)
            assert not isinstance(source, PreferenceReasoningGymSource)
            convert = functools.partial(self._maker.from_row, source)
            read = read_rows(source, field)
            if not source.names_columns:
                read = pair_up(read, source.row_format)
            return collect(read, convert, self._config, report)

        def sequences(report: LoadReport) -> Iterator[TokenSequence]:
            return _in_turn(pairs(report))

        kind = {"kind": "preference", "max_sequence_length": self._longest}
        store, report = load_tokens(source, self._config, self._tokenizer, kind, field, sequences)
        return _StoredPairs(store, report, self._longest, field)

    def _window(
        self,
        source: PreferenceJsonlSource | PreferenceHfSource,
        field: str,
        rows: Iterable[Row],
        report: LoadReport,
        _before: int,
    ) -> Pairs:
        convert = functools.partial(self._maker.from_row, source)
        if not source.names_columns and source.row_format == "auto":
            rows = refuse_unpaired(rows, f"{field}.streaming")
        store = TokenStore.of(_in_turn(collect(rows, convert, self._config, report, whole=False)))
        return _StoredPairs(store, report, self._longest, field)


def _in_turn(pairs: Iterable[Pair]) -> Iterator[TokenSequence]:
    """Yield the chosen and the rejected sequence of each pair, as the store has them."""
    for pair in pairs:
        yield replace(pair.chosen, num_prompt_tokens=pair.num_prompt_tokens)
        yield pair.rejected
